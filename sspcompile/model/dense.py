"""The dense model of a build: its files and, once somebody asks for it, the model in memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sspcompile.checkpoint import Checkpoint, fingerprint, locate
from sspcompile.checkpoint.companions import companions
from sspcompile.checkpoint.locate import EMBEDDED
from sspcompile.model.chat import PLAIN, Rendering
from sspcompile.model.placement import ON_CPU, Placement

if TYPE_CHECKING:
    from sspcompile.model.decoder import LoadedModel


@dataclass(frozen=True)
class DenseModel:
    """A dense checkpoint: opened, identified, and called `name` as the user typed it."""

    checkpoint: Checkpoint
    fingerprint: str
    name: str

    @property
    def place(self) -> str:
        """Where to find it again from any folder: a hub name, `embedded`, or an absolute path."""
        typed = Path(self.name).expanduser()
        if not typed.is_dir() or self.name == EMBEDDED:
            return self.name
        return os.path.abspath(typed)  # noqa: PTH100 (resolves `..` and keeps symbolic links, which absolute() does not)

    def load(
        self, *, placement: Placement = ON_CPU, trust_remote_code: bool = False, rendering: Rendering = PLAIN
    ) -> LoadedModel:
        # Headers alone need no torch.
        from sspcompile.model.loading import load

        return load(
            self.checkpoint.path,
            fingerprint=self.fingerprint,
            placement=placement,
            trust_remote_code=trust_remote_code,
            rendering=rendering,
        )


def open_dense(model: str | None) -> DenseModel:
    """Find and check the dense checkpoint; reads headers, and small weights for the fingerprint."""
    checkpoint = Checkpoint(locate(model))
    if checkpoint.has_weights:
        checkpoint.tensors  # noqa: B018 (validates headers before anything heavy starts)
        companions(checkpoint.path)  # and what will go with a cut
    return DenseModel(checkpoint, fingerprint(checkpoint), model or EMBEDDED)
