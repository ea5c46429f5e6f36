"""HeadMask: which layers, query heads and MLP channels stay, why, and under which budget. Saved as mask.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter

from sspcompile.errors import ArtifactError

# Version 1 named heads alone, version 2 channels too. Version 3 names removed layers, version 4 has layers without
# attention, version 5 channels of experts; each is written where there are some: a reader that knows less must not take
# such a mask for another.
READS = (1, 2, 3, 4, 5)
WITHOUT_LAYERS, WITH_LAYERS, WITHOUT_ATTENTION, OF_EXPERTS = READS[1:]
# What a bound on memory or time says beside its number: for how many sequences of how many tokens it is.
LOAD = ("batch", "context")
Layout = Literal["uniform", "per-layer"]


@dataclass(frozen=True, eq=False)
class Kept:
    """Which units stay, true where one does: `heads` bool [layers, heads], and `channels` of the MLPs bool
    [layers, mlps * width], None where all of them do.

    `layers` bool [layers]: false where a whole layer is removed, so that what it puts out is what it was given; None
    where all stay. The other rows of a removed layer are false. A layer that is there and keeps no head has lost its
    attention: nothing of it, no bias either, joins the residual stream.
    """

    heads: np.ndarray
    channels: np.ndarray | None = None
    layers: np.ndarray | None = None

    @property
    def everything(self) -> bool:
        return bool(self.heads.all()) and (self.channels is None or bool(self.channels.all()))

    @property
    def key(self) -> bytes:
        """Equal for equal masks of one model."""
        parts = (self.heads, self.channels, self.layers)
        return b"".join(part.tobytes() for part in parts if part is not None)

    def stays(self, layer: int) -> bool:
        """Whether a layer is there, with whatever is left of it."""
        return self.layers is None or bool(self.layers[layer])

    @property
    def removed(self) -> tuple[int, ...]:
        """The numbers of the layers that are removed whole."""
        return () if self.layers is None else tuple(np.flatnonzero(~self.layers).tolist())

    def attends(self, layer: int) -> bool:
        """Whether a layer is there with any of its heads."""
        return bool(self.heads[layer].any())

    @property
    def silent(self) -> tuple[int, ...]:
        """The numbers of the layers that stay without their attention."""
        return tuple(layer for layer in range(len(self.heads)) if self.stays(layer) and not self.attends(layer))


@dataclass(frozen=True)
class HeadMask:
    """The kept units of every layer, with what they were chosen by.

    `kept[layer]` is ascending. In a layer every key/value group that keeps a head keeps the same number of them, so
    that kept heads / kept groups is a whole number. A layer that stays and keeps no head loses its attention whole;
    only the per-layer layout has such. `scores` is `[layers][heads]` in the criterion's own unit;
    `whitelist` lists [layer, head] pairs that were kept before any score. `scenario` holds the name, the mixture over
    domains, its breadth in [0, 1] and the unknown share. `model` is the fingerprint of the dense checkpoint.
    `channels[layer]` are the kept channels of the layer's MLP out of `intermediate`, ascending; None where no channel
    is removed in any layer. Where a layer has `experts` of `intermediate` channels each, channel c of expert e has the
    number e * intermediate + c, and every expert of a layer keeps as many. `removed` are the layers that go whole,
    ascending; their rows are empty, and what they put out is what they were given. `size_requested` is the budget as a
    share of all parameters, None where it was another; `params_requested` the number of parameters that it was given
    as. `memory_requested`: the bytes that weights and KV cache may take, and for how many sequences (`batch`) of how
    many tokens (`context`). `latency_requested`: the nanoseconds that a decoded token may take, for as many.
    """

    model: str
    layers: int
    heads: int
    kv_heads: int
    kept: tuple[tuple[int, ...], ...]
    layout: Layout
    keep_requested: float
    keep_achieved: float
    scores: tuple[tuple[float, ...], ...]
    whitelist: tuple[tuple[int, int], ...]
    criterion: str
    scenario: Mapping[str, Any]
    intermediate: int = 0
    channels: tuple[tuple[int, ...], ...] | None = None
    size_requested: float | None = None
    params_requested: int | None = None
    memory_requested: Mapping[str, int] | None = None
    latency_requested: Mapping[str, int] | None = None
    removed: tuple[int, ...] = ()
    experts: int = 1

    @property
    def group_size(self) -> int:
        return self.heads // self.kv_heads

    def as_array(self) -> np.ndarray:
        """Bool [layers, heads], true where the head stays."""
        array = np.zeros((self.layers, self.heads), dtype=bool)
        for layer, kept in enumerate(self.kept):
            array[layer, list(kept)] = True
        return array

    @property
    def units(self) -> Kept:
        """Heads, channels and layers as arrays."""
        channels = layers = None
        if self.channels is not None:
            channels = np.zeros((self.layers, self.experts * self.intermediate), dtype=bool)
            for layer, kept in enumerate(self.channels):
                channels[layer, list(kept)] = True
        if self.removed:
            layers = np.ones(self.layers, dtype=bool)
            layers[list(self.removed)] = False
        return Kept(self.as_array(), channels, layers)

    @property
    def staying(self) -> tuple[int, ...]:
        """The layers that are left, ascending: where they stand in the dense model."""
        return tuple(layer for layer in range(self.layers) if layer not in self.removed)

    @property
    def silent(self) -> tuple[int, ...]:
        """The layers that stay without their attention, ascending."""
        return tuple(layer for layer in self.staying if not self.kept[layer])

    @property
    def widths(self) -> tuple[int, ...] | None:
        """Kept channels of each MLP (or expert) of every layer; None where all stay."""
        return None if self.channels is None else tuple(len(kept) // self.experts for kept in self.channels)

    def kept_groups(self, layer: int) -> tuple[int, ...]:
        """Ascending key/value heads of a layer that keep at least one of their query heads."""
        return tuple(sorted({head // self.group_size for head in self.kept[layer]}))


_MASK = TypeAdapter(HeadMask)
KEYS = frozenset(field.name for field in fields(HeadMask))


def kept_of(array: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Bool [layers, units] -> per layer the ascending kept units."""
    return tuple(tuple(int(head) for head in np.flatnonzero(row)) for row in array)


def dump_mask(mask: HeadMask) -> str:
    """mask.json as text: one line per layer, so that a person can read it and a diff can show it."""
    value = {"schema_version": max(WITHOUT_LAYERS, _version_of(mask)), **vars(mask)}
    if not mask.removed:
        del value["removed"]
    if mask.experts == 1:
        del value["experts"]
    if mask.latency_requested is None:
        del value["latency_requested"]
    lines = []
    for key, item in value.items():
        if key in ("kept", "scores", "channels") and item is not None:
            rows = ",\n    ".join(json.dumps(row) for row in item)
            lines.append(f'  "{key}": [\n    {rows}\n  ]')
        else:
            lines.append(f"  {json.dumps(key)}: {json.dumps(item)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _version_of(mask: HeadMask) -> int:
    """The first schema version whose readers know everything that a mask holds."""
    if mask.experts > 1:
        return OF_EXPERTS
    if mask.silent:
        return WITHOUT_ATTENTION
    return WITH_LAYERS if mask.removed else READS[0] if mask.channels is None else WITHOUT_LAYERS


def load_mask(path: Path) -> HeadMask:
    """Open a mask.json. Raises ArtifactError when it is unreadable, of another schema or contradicts itself."""
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        raise ArtifactError(f"There is no mask {path}.", hint="Run `sspcompile build` first.") from error
    return parse_mask(text, source=str(path))


def parse_mask(text: str | bytes, *, source: str = "The mask") -> HeadMask:
    """The mask that the content of a mask.json describes, called `source` in errors. Raises as `load_mask` does."""
    try:
        value = json.loads(text)
        version = value.pop("schema_version")
        if type(version) is not int or version not in READS:
            known = ", ".join(map(str, READS))
            raise ArtifactError(f"{source} is of another schema version.", hint=f"This version reads {known}.")
        if unknown := set(value) - KEYS:
            raise ArtifactError(
                f"{source} holds {min(unknown)!r:.80}, which no mask has.", hint=f"Known: {', '.join(sorted(KEYS))}."
            )
        # JSON knows no tuples, which the strictness of JSON mode allows for.
        mask = _MASK.validate_json(json.dumps(value, allow_nan=False), strict=True)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{source} is not a mask.json.", hint="Run `sspcompile build` again.") from error
    check_mask(mask, source=source)
    if version < (needed := _version_of(mask)):
        raise ArtifactError(
            f"{source} is of schema version {version} and holds what begins with version {needed}.",
            hint=f"Set schema_version to {needed} where that is meant, or compile it again with `sspcompile build`.",
        )
    return mask


def whole_mask(layers: int, heads: int, kv_heads: int) -> HeadMask:
    """The mask that keeps every head of a model."""
    kept = (tuple(range(heads)),) * layers
    return HeadMask("", layers, heads, kv_heads, kept, "uniform", 1.0, 1.0, ((1.0,) * heads,) * layers, (), "", {})


def check_mask(mask: HeadMask, *, source: str = "The mask") -> None:
    """Raise ArtifactError unless indices are in range, ascending, and regular within every layer that stays, and what
    they were chosen by has the shape of the model.
    """

    def refuse(problem: str) -> ArtifactError:
        return ArtifactError(f"{source}: {problem}.", hint="Compile the mask again with `sspcompile build`.")

    if min(mask.layers, mask.heads, mask.kv_heads, mask.experts) < 1 or mask.intermediate < 0:
        mlps = f"{mask.experts} experts of {mask.intermediate} channels"
        raise refuse(f"{mask.layers} layers of {mask.heads} heads ({mask.kv_heads} kv) and {mlps}")
    if len(mask.kept) != mask.layers or mask.heads % mask.kv_heads:
        raise refuse(f"{len(mask.kept)} rows for {mask.layers} layers of {mask.heads} heads ({mask.kv_heads} kv)")
    _check_removed(mask, refuse)
    if mask.silent == mask.staying:
        raise refuse("no layer keeps a head; the attention of one is needed at least")
    for layer in mask.staying:
        kept = mask.kept[layer]
        if not kept and mask.layout == "per-layer":
            continue
        if not kept:
            raise refuse(f"layer {layer} keeps no head, which the layout per-layer alone may have")
        if list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= mask.heads:
            raise refuse(f"layer {layer} lists heads that are out of range, double or unsorted")
        groups = [head // mask.group_size for head in kept]
        if len({groups.count(group) for group in groups}) != 1:
            raise refuse(f"layer {layer} keeps different numbers of heads in its key/value groups")
    if mask.layout == "uniform" and len({(len(mask.kept[i]), len(mask.kept_groups(i))) for i in mask.staying}) != 1:
        raise refuse("a uniform mask must keep the same numbers in every layer")
    if mask.channels is not None:
        _check_channels(mask, refuse)
    elif mask.experts > 1:
        raise refuse(f"it names {mask.experts} experts and no channels of them")
    _check_reasons(mask, refuse)


def _check_reasons(mask: HeadMask, refuse: Callable[[str], ArtifactError]) -> None:
    """What units were chosen by: scores, whitelist, and what was asked for."""
    if len(mask.scores) != mask.layers or any(len(row) != mask.heads for row in mask.scores):
        raise refuse(f"scores are not a number for each of {mask.layers} layers of {mask.heads} heads")
    for layer, head in mask.whitelist:
        if not (0 <= layer < mask.layers and 0 <= head < mask.heads):
            raise refuse(f"the whitelist names head {head} of layer {layer}, which is out of range")
    for name, unit in (("memory_requested", "bytes"), ("latency_requested", "nanoseconds")):
        bound = getattr(mask, name)
        if bound is not None and (set(bound) != {unit, *LOAD} or min(bound.values()) < 1):
            raise refuse(f"{name} is not {unit}, {LOAD[0]} and {LOAD[1]}, each a number from 1")


def _check_removed(mask: HeadMask, refuse: Callable[[str], ArtifactError]) -> None:
    removed = list(mask.removed)
    if removed != sorted(set(removed)) or not {*removed} <= {*range(mask.layers)}:
        raise refuse("it lists removed layers that are out of range, double or unsorted")
    if len(removed) == mask.layers:
        raise refuse("every layer is removed; at least one is needed")
    for layer in removed:
        if mask.kept[layer] or (mask.channels is not None and layer < len(mask.channels) and mask.channels[layer]):
            raise refuse(f"layer {layer} is removed and keeps heads or channels")


def _check_channels(mask: HeadMask, refuse: Callable[[str], ArtifactError]) -> None:
    rows = mask.channels or ()
    if len(rows) != mask.layers or min(mask.intermediate, mask.experts) < 1:
        raise refuse(f"{len(rows)} rows of channels (of {mask.intermediate}) for {mask.layers} layers")
    for layer in mask.staying:
        kept = rows[layer]
        if not kept:
            raise refuse(f"layer {layer} keeps no channel of its MLP; at least one is needed")
        if list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= mask.experts * mask.intermediate:
            raise refuse(f"layer {layer} lists channels that are out of range, double or unsorted")
        _, of_each = np.unique(np.array(kept) // mask.intermediate, return_counts=True)
        if len(of_each) != mask.experts or len({*of_each.tolist()}) != 1:
            raise refuse(f"layer {layer} keeps different numbers of channels in its experts")
    if mask.layout == "uniform" and len({len(rows[layer]) for layer in mask.staying}) != 1:
        raise refuse("a uniform mask must keep the same number of channels in every layer")
