"""What stays of a layer, and of the tensors of a checkpoint whose layers are cut so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sspcompile.checkpoint.tensors import attention_shapes, layer_of, mlp_shapes, of_attention
from sspcompile.families import Geometry, Host
from sspcompile.slicing.counts import o_proj_of
from sspcompile.slicing.layouts import GONE, SILENT, Choice, Shape
from sspcompile.slicing.mask import kept_of
from sspcompile.slicing.measures import Tensors


@dataclass(frozen=True)
class LayerCut:
    """Kept query heads and kept key/value heads of one layer, indices of the source in the order of the output.

    No heads: the attention goes whole, and of a layer that is not `removed`, which goes whole, the MLP stays.
    `channels`: kept channels of the MLP, or of all experts; None for all of them. A mask's are ascending, only nested
    models reorder.
    """

    heads: tuple[int, ...]
    groups: tuple[int, ...]
    channels: tuple[int, ...] | None = None
    removed: bool = False

    @property
    def shape(self) -> Shape:
        """(groups, heads per group), or what says that there are none."""
        if self.removed:
            return GONE
        return (len(self.groups), len(self.heads) // len(self.groups)) if self.groups else SILENT


REMOVED = LayerCut((), (), removed=True)


def cuts_of(g: Geometry, choice: Choice) -> tuple[LayerCut, ...]:
    """What a choice leaves of every layer."""
    rows = zip(choice.shapes, kept_of(choice.kept), choice.kept_channels or (None,) * g.layers, strict=True)
    return tuple(
        REMOVED
        if shape == GONE
        else LayerCut(kept, tuple(sorted({head // g.group_size for head in kept})), channels=channels)
        for shape, kept, channels in rows
    )


def widths_left(g: Geometry, layers: Sequence[LayerCut]) -> list[int]:
    """Channels of each MLP of every layer; 0 of a removed layer."""
    whole = [0 if layer.removed else g.channels for layer in layers]
    kept = [all_ if cut.channels is None else len(cut.channels) for all_, cut in zip(whole, layers, strict=True)]
    return [count // g.mlps for count in kept]


def tensors_left(g: Geometry, layers: Sequence[LayerCut], host: Host, expected: Tensors) -> Tensors:
    """What is written, under the names of the source, in its order."""
    tensors = {name: one for name, one in expected.items() if not _goes(g, layers, name)}
    hosted = replace(g, qkv_bias=g.qkv_bias or "qkv" in host.zero_biases, o_bias=g.o_bias or "o" in host.zero_biases)
    for layer, cut in enumerate(layers):
        if cut.removed:
            continue
        dtype = expected[o_proj_of(layer)][1]
        kept = attention_shapes(hosted, layer, len(cut.heads), len(cut.groups)) if cut.heads else {}
        for name, shape in kept.items():
            tensors[name] = (shape, expected[name][1] if name in expected else dtype)
        if cut.channels is not None:
            narrower = mlp_shapes(g, layer, len(cut.channels) // g.mlps)
            tensors |= {name: (shape, expected[name][1]) for name, shape in narrower.items()}
    return tensors


def _goes(g: Geometry, layers: Sequence[LayerCut], name: str) -> bool:
    """Whether a tensor goes with the layer that it belongs to, or with its attention."""
    layer = layer_of(name)
    return layer is not None and (layers[layer].removed or (not layers[layer].heads and of_attention(g, name)))
