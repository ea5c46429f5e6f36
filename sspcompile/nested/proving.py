"""The proof of a nested model: its bytes are the dense model's in the order of removal, and it computes the same.

Which rows and columns belong to which unit is worked out here apart from the code that moved them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sspcompile.checkpoint import Checkpoint
from sspcompile.checkpoint.headers import TensorInfo, read_words
from sspcompile.checkpoint.source import tensor_table
from sspcompile.errors import ParityError
from sspcompile.families import Geometry, layer_prefix
from sspcompile.model.placement import ON_CPU, Placement
from sspcompile.nested.order import Order
from sspcompile.progress import Progress, Steps, no_steps, stage_of
from sspcompile.proof.claim import Claim
from sspcompile.proof.parity import REPORT, Parity
from sspcompile.proof.prove import compare
from sspcompile.slicing.mask import whole_mask

BAND_BYTES = 16 << 20


def prove_whole(
    dense: Checkpoint,
    written: Path,
    order: Order,
    probes: Sequence[Sequence[int]],
    progress: Progress,
    *,
    layerwise: bool | None = None,
    placement: Placement = ON_CPU,
) -> Parity:
    """Hold a reordered model against the dense one, on token ids `probes`. Raises what `prove` raises."""
    check_order(dense, written, order, stage_of(progress, "comparing bytes"))
    g = dense.geometry
    claim = Claim(dense, whole_mask(g.layers, g.heads, g.kv_heads), written, custom_code=False)
    return compare(claim, probes, progress, layerwise=layerwise, placement=placement)


def check_order(dense: Checkpoint, written: Path, order: Order, progress: Steps = no_steps) -> None:
    """Raise ParityError naming the first tensor that is not the dense model's in this order."""
    source, found = dense.tensors, tensor_table(written)
    if set(source) != set(found):
        raise ParityError(f"The written model lacks or adds {min(set(source) ^ set(found))}.", hint=REPORT)
    moved = _moved(dense.geometry, order)
    for number, (name, info) in enumerate(found.items()):
        if not _same(source[name], info, *moved.get(name, (0, None))):
            raise ParityError(f"{name} is not the dense model's in the order of removal.", hint=REPORT)
        progress(number + 1, len(found))


def _moved(g: Geometry, order: Order) -> dict[str, tuple[int, np.ndarray]]:
    """Tensor name -> axis, and the number in the dense model of every entry along it."""
    found: dict[str, tuple[int, np.ndarray]] = {}
    for layer, groups in enumerate(order.groups):
        attention = layer_prefix(layer) + "self_attn."
        one = np.concatenate([np.arange(group * g.head_dim, (group + 1) * g.head_dim) for group in groups])
        span = g.group_size * g.head_dim
        query = np.concatenate([np.arange(group * span, (group + 1) * span) for group in groups])
        for name, rows in (("q_proj", query), ("k_proj", one), ("v_proj", one)):
            found |= {f"{attention}{name}.{kind}": (0, rows) for kind in ("weight", "bias")}
        found[attention + "o_proj.weight"] = 1, query
        if order.channels is not None:
            channels = np.array(order.channels[layer])
            for linear in g.family.mlp:
                name = f"{layer_prefix(layer)}{linear.name}."
                if linear.columns == "intermediate":
                    found[name + "weight"] = 1, channels
                else:
                    found |= {name + kind: (0, channels) for kind in ("weight", "bias")}
    return found


def _same(original: TensorInfo, info: TensorInfo, axis: int, numbers: np.ndarray | None) -> bool:
    if info.dtype != original.dtype or info.shape != original.shape:
        return False
    if numbers is not None and axis == 0:  # rows come from anywhere: the one tensor is read as a whole
        return np.array_equal(read_words(original)[numbers], read_words(info))
    return all(
        np.array_equal(words if numbers is None else words[:, numbers], read_words(info.band(*rows)))
        for rows in original.bands(BAND_BYTES)
        for words in [read_words(original.band(*rows))]
    )
