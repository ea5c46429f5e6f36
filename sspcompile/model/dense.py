"""The dense model of a build: its files and, once somebody asks for it, the model in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sspcompile.checkpoint import Checkpoint, fingerprint, locate
from sspcompile.checkpoint.companions import companions
from sspcompile.checkpoint.locate import EMBEDDED
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.loading import load


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
        return str(typed.absolute()) if typed.is_dir() and self.name != EMBEDDED else self.name

    def load(
        self, *, device: str = "cpu", device_map: str | None = None, trust_remote_code: bool = False
    ) -> LoadedModel:
        return load(
            self.checkpoint.path,
            fingerprint=self.fingerprint,
            device=device,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
        )


def open_dense(model: str | None) -> DenseModel:
    """Find and check the dense checkpoint; reads headers, and small weights for the fingerprint."""
    checkpoint = Checkpoint(locate(model))
    if checkpoint.has_weights:
        checkpoint.tensors  # noqa: B018 (validates headers before anything heavy starts)
        companions(checkpoint.path)  # and what will go with a cut
    return DenseModel(checkpoint, fingerprint(checkpoint), model or EMBEDDED)
