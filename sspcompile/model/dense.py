"""The dense model of a build: its files and, once somebody asks for it, the model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sspcompile.checkpoint import Checkpoint, fingerprint
from sspcompile.checkpoint.adapters import demand_weights, read_adapter
from sspcompile.checkpoint.companions import companions
from sspcompile.checkpoint.gguf import read_gguf
from sspcompile.checkpoint.locate import find
from sspcompile.embedded import EMBEDDED
from sspcompile.model.chat import PLAIN, Rendering
from sspcompile.model.dequantising import dequantised, sizes_of
from sspcompile.model.merging import base_of, merged
from sspcompile.model.placement import ON_CPU, Placement

if TYPE_CHECKING:
    from sspcompile.model.decoder import LoadedModel


@dataclass(frozen=True)
class DenseModel:
    """A dense checkpoint: opened, identified, and called `name` as the user typed it.

    `place` and `revision` say where to find it again: see `Found`. `merged`: what an adapter and its base were.
    """

    checkpoint: Checkpoint
    fingerprint: str
    name: str
    place: str
    revision: str | None = None
    merged: Mapping[str, Any] = field(default_factory=dict)

    @property
    def origin(self) -> dict[str, Any]:
        """What a manifest says of it."""
        revision = {"source_revision": self.revision} if self.revision is not None else {}
        return {"source": self.fingerprint, "source_name": self.place, **revision, **self.merged}

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
    """Find and check the dense checkpoint; reads headers, and small weights for the fingerprint.

    A LoRA adapter is merged into its base, for as long as the process lives: see `merging`. A GGUF file becomes a
    folder below artifacts/gguf: see `dequantising`.
    """
    found, name, origin = find(model), model or EMBEDDED, {}
    if found.adapter:
        whole = merged(demand_weights(read_adapter(found.folder, name)))
        checkpoint, origin = whole.checkpoint, whole.origin
    elif found.gguf:
        read = dequantised(read_gguf(found.folder, name))
        checkpoint, origin = read.checkpoint, read.origin
    else:
        checkpoint = Checkpoint(found.folder)
    if checkpoint.has_weights:
        checkpoint.tensors  # noqa: B018 (validates headers before anything heavy starts)
        companions(checkpoint.path)  # and what will go with a cut
    return DenseModel(checkpoint, fingerprint(checkpoint), name, found.place, found.revision, origin)


def open_sizes(model: str | None) -> Checkpoint:
    """What says how large the parts of a model are: the checkpoint, for an adapter that of its base, or for a GGUF file
    its configuration."""
    found = find(model)
    if found.gguf:
        return sizes_of(read_gguf(found.folder, str(model)))
    return base_of(read_adapter(found.folder, str(model)))[1] if found.adapter else Checkpoint(found.folder)


def holds_weights(model: str | None) -> bool:
    """Whether there are weights beside the configuration, so that a scenario can be read with the model."""
    return find(model).gguf or open_sizes(model).has_weights
