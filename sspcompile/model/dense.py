"""The dense model of a build: its files and, once somebody asks for it, the model in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sspcompile.checkpoint import Checkpoint, fingerprint
from sspcompile.checkpoint.companions import companions
from sspcompile.checkpoint.locate import EMBEDDED, find
from sspcompile.model.chat import PLAIN, Rendering

if TYPE_CHECKING:
    from sspcompile.model.decoder import LoadedModel


@dataclass(frozen=True)
class DenseModel:
    """A dense checkpoint: opened, identified, and called `name` as the user typed it.

    `place` and `revision` say where to find it again: see `Found`.
    """

    checkpoint: Checkpoint
    fingerprint: str
    name: str
    place: str
    revision: str | None = None

    @property
    def origin(self) -> dict[str, Any]:
        """What a manifest says of it."""
        revision = {"source_revision": self.revision} if self.revision is not None else {}
        return {"source": self.fingerprint, "source_name": self.place, **revision}

    def load(
        self,
        *,
        device: str = "cpu",
        device_map: str | None = None,
        trust_remote_code: bool = False,
        rendering: Rendering = PLAIN,
    ) -> LoadedModel:
        # Headers alone need no torch.
        from sspcompile.model.loading import load

        return load(
            self.checkpoint.path,
            fingerprint=self.fingerprint,
            device=device,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            rendering=rendering,
        )


def open_dense(model: str | None) -> DenseModel:
    """Find and check the dense checkpoint; reads headers, and small weights for the fingerprint."""
    found = find(model)
    checkpoint = Checkpoint(found.folder)
    if checkpoint.has_weights:
        checkpoint.tensors  # noqa: B018 (validates headers before anything heavy starts)
        companions(checkpoint.path)  # and what will go with a cut
    return DenseModel(checkpoint, fingerprint(checkpoint), model or EMBEDDED, found.place, found.revision)
