"""Repairs of all members as low-rank differences from the dense matrices, within one budget of bytes.

With D [out, in] what a refit changed in the columns that a member keeps, and s_c the energy of input c, the best
difference of rank r in the metric sum_c s_c |D_c|^2 projects outputs onto the first r left singular vectors U of
D diag(sqrt(s)): it is U (U^T D) (Eckart and Young 1936; scaling by activations as in ASVD, Yuan et al. 2023,
arXiv 2312.05821). A direction is worth what it adds to that sum; directions of all matrices of all members are taken by
worth per byte until the budget is full. That says how many directions each matrix gets. The fit that counts comes
after it, and sees in every layer what truncation missed in those before (`Truncated`).

s_c = sum_n w_n x_nc^2 / |h_n|^2 over the fit texts, with x the inputs in the masked, repaired model, h the residual
stream that the layer puts out, and w as in the fit. Norms read shares of the stream, so layers are comparable.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sspcompile.checkpoint import Checkpoint
from sspcompile.checkpoint.headers import read_words
from sspcompile.families import Geometry, layer_prefix
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.hooks import reading
from sspcompile.model.modules import down_proj, layer_output, o_proj
from sspcompile.model.stored import as_tensor, double_device, in_double
from sspcompile.model.text import Batch
from sspcompile.nested.low_rank import LowRank, Stored, low_rank, numbers, rank_bytes, refitted
from sspcompile.nested.order import Order, Prefix
from sspcompile.progress import Steps, no_steps
from sspcompile.repair.dense import position_weights
from sspcompile.repair.repair import Repair, down_name, masked
from sspcompile.slicing.mask import Kept

# Of the whole model's bytes, for all repairs of all members.
REPAIR_SHARE = 0.15
# Of a difference's energy: what may be missing from one that is as good as the full matrix.
NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class Energies:
    """Of the inputs of o_proj [layers][heads * D] and of down_proj [layers][intermediate], float64."""

    o_proj: tuple[Tensor, ...]
    down: tuple[Tensor, ...]


@torch.inference_mode()
def energies_of(loaded: LoadedModel, kept: Kept, repair: Repair, batches: Sequence[Batch]) -> Energies:
    """Of the masked, repaired model on the texts that fitted its repair, in one pass."""
    sums = _Sums(loaded)
    for batch, weights in zip(batches, position_weights(batches), strict=True):
        with masked(loaded, kept, repair), sums.reading(batch, weights):
            loaded.model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return Energies(tuple(sums.sums["o_proj"]), tuple(sums.sums["down_proj"]))


class _Sums:
    """Inputs wait for what their layer puts out, one layer at a time."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._layers = loaded.layers
        self._modules = {
            "o_proj": [o_proj(layer) for layer in self._layers],
            "down_proj": [down_proj(layer) for layer in self._layers],
        }
        self.sums = {
            name: [torch.zeros(one.in_features, dtype=torch.float64) for one in found]
            for name, found in self._modules.items()
        }
        self._entered: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def reading(self, batch: Batch, weights: Tensor) -> Iterator[None]:
        """While a batch passes; `weights` [B, T]: what its positions count."""
        counted = weights * batch.attention_mask
        with contextlib.ExitStack() as stack:
            for name, modules in self._modules.items():
                stack.enter_context(reading(modules, name, partial(self._enter, name)))
            for index, layer in enumerate(self._layers):
                hook = layer.register_forward_hook(partial(self._leave, index, counted))
                stack.callback(hook.remove)
            yield

    def _enter(self, name: str, _index: int, x: Tensor) -> None:
        self._entered[name] = x

    def _leave(self, index: int, counted: Tensor, _layer: Any, _args: Any, output: Any) -> None:
        stream = layer_output(output)
        weights = counted.to(stream.device)
        there = weights > 0  # padding may hold anything, NaN included
        shares = weights[there] / stream[there].float().square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        for name, sums in self.sums.items():
            x = self._entered.pop(name)[there].float()
            sums[index] += in_double((x.square() * shares[:, None]).sum(0)).cpu()


@dataclass(frozen=True)
class Place:
    """A matrix of a member: its name, and the numbers in the dense model of its columns in the order of removal."""

    name: str
    dtype: str
    layer: int
    down: bool
    columns: np.ndarray


def places_of(checkpoint: Checkpoint, order: Order, prefix: Prefix) -> tuple[Place, ...]:
    """Every o_proj and down_proj of a member."""
    g, found = checkpoint.geometry, []
    for layer in range(g.layers):
        heads, channels = _columns(g, order, prefix, layer)
        for name, down, columns in (
            (f"{layer_prefix(layer)}self_attn.o_proj.weight", False, heads),
            (down_name(g, layer), True, channels),
        ):
            if name in checkpoint.tensors:
                found.append(Place(name, checkpoint.tensors[name].dtype, layer, down, columns))
    return tuple(found)


def _columns(g: Geometry, order: Order, prefix: Prefix, layer: int) -> tuple[np.ndarray, np.ndarray]:
    span = g.group_size * g.head_dim
    groups = np.array(order.groups[layer][: prefix.groups[layer]], dtype=np.intp)
    width = prefix.widths[layer]
    channels = np.arange(width) if order.channels is None else np.array(order.channels[layer][:width], dtype=np.intp)
    return (groups[:, None] * span + np.arange(span)).ravel(), channels


@dataclass(frozen=True)
class Truncated:
    """What is written of a member's refitted matrices (`repair.written.Written`): of each as many directions as there
    was `room` for in an earlier fit, by name, or the matrix in full where that is None; of others the dense columns.

    So a fit sees what truncation misses in the layers before, and makes up for it. `places` are of the member,
    `energies` those of its inputs in the earlier fit; it is worked out on `device`.
    """

    checkpoint: Checkpoint
    places: Sequence[Place]
    room: Mapping[str, int | None]
    energies: Energies
    device: torch.device
    _found: dict[str, Stored] = field(default_factory=dict)

    @property
    def key(self) -> object:
        return sorted(self.room.items())

    def of(self, layer: int, weight: Tensor, *, down: bool, kept: Tensor | None) -> Tensor:
        place = next(one for one in self.places if (one.layer, one.down) == (layer, down))
        stored = self._stored(place, weight)
        return _put(self.checkpoint, place, stored).to(weight.device, weight.dtype)

    def stored(self, repair: Repair) -> dict[str, Stored]:
        """What is written of a repair, by name, columns in the order of removal."""
        for place in self.places:
            weight = (repair.down if place.down else repair.weights).get(place.layer)
            if weight is not None:
                self._stored(place, weight)
        return {place.name: self._found[place.name] for place in self.places if place.name in self._found}

    def _stored(self, place: Place, weight: Tensor) -> Stored | None:
        if place.name in self.room and place.name not in self._found:
            room, columns = self.room[place.name], torch.from_numpy(place.columns)
            if room is None:
                self._found[place.name] = _words(weight[:, columns].cpu())
            else:
                energy = (self.energies.down if place.down else self.energies.o_proj)[place.layer][columns]
                prefix = read_words(self.checkpoint.tensors[place.name])[:, place.columns]
                found = _difference(0, place, weight[:, columns].cpu(), prefix, energy, double_device(self.device))
                found.trim(min(room, found.low.rank))
                if found.low.rank:
                    self._found[place.name] = found.low
        return self._found.get(place.name)


def _put(checkpoint: Checkpoint, place: Place, stored: Stored | None) -> Tensor:
    """A member's matrix in the dense shape, zeros in the columns that it has not."""
    dense = read_words(checkpoint.tensors[place.name])
    words = dense[:, place.columns]
    full = np.zeros_like(dense)
    full[:, place.columns] = words if stored is None else refitted(words, stored, place.dtype)
    return as_tensor(full, place.dtype)


def repair_of(stored: Mapping[str, Stored], places: Sequence[Place], checkpoint: Checkpoint) -> Repair | None:
    """What a member's stored matrices put into the masked model: what is judged is what will be cut out."""
    weights: dict[int, Tensor] = {}
    down: dict[int, Tensor] = {}
    for place in places:
        if place.name not in stored:
            continue
        (down if place.down else weights)[place.layer] = _put(checkpoint, place, stored[place.name])
    return Repair(weights, down=down) if stored else None


@dataclass
class _Difference:
    """Of one matrix, with what its directions are worth and cost, the best first. `full` where there is room for the
    matrix itself, which is then the last of the directions.
    """

    member: int
    name: str
    low: LowRank
    full: np.ndarray | None
    density: np.ndarray
    cost: np.ndarray

    def trim(self, taken: int) -> None:
        if taken == len(self.cost):
            return
        self.full = None
        low = self.low
        self.low = LowRank(low.outputs[:, :taken].copy(), low.inputs[:taken].copy(), low.scales[:taken].copy())
        self.density, self.cost = self.density[:taken], self.cost[:taken]

    @property
    def stored(self) -> Stored:
        return self.full if self.full is not None else self.low


class Pool:
    """The differences of members, together at most `budget` bytes; what does not fit is let go of at once."""

    def __init__(self, checkpoint: Checkpoint, budget: int) -> None:
        self._checkpoint = checkpoint
        self._budget = budget
        self._found: list[_Difference] = []

    def add(
        self,
        member: int,
        places: Sequence[Place],
        repair: Repair,
        energies: Energies,
        device: torch.device,
        progress: Steps = no_steps,
    ) -> None:
        """What a member's repair changes, worked out on `device`. It can push out directions of members before it."""
        for number, place in enumerate(places):
            weight = (repair.down if place.down else repair.weights).get(place.layer)
            if weight is not None:
                columns = torch.from_numpy(place.columns)
                energy = (energies.down if place.down else energies.o_proj)[place.layer][columns]
                prefix = read_words(self._checkpoint.tensors[place.name])[:, place.columns]
                found = _difference(member, place, weight[:, columns], prefix, energy, double_device(device))
                self._found += [found] if len(found.cost) else []
                self._trim()  # what is out once stays out: what ranks before it only grows
            progress(number + 1, len(places))

    def stored(self, member: int) -> dict[str, Stored]:
        """What there is room for of a member's repair, by name, columns in the order of removal."""
        return {one.name: one.stored for one in self._found if one.member == member}

    def room(self, member: int) -> dict[str, int | None]:
        """The same as numbers of directions; None for a matrix in full."""
        return {one.name: one.low.rank if one.full is None else None for one in self._found if one.member == member}

    def _trim(self) -> None:
        """By worth per byte. The order of directions of one matrix is kept, because their density never rises."""
        if not self._found:
            return
        owner = np.concatenate([np.full(len(one.cost), at) for at, one in enumerate(self._found)])
        density, cost = (np.concatenate([getattr(one, key) for one in self._found]) for key in ("density", "cost"))
        ranked = np.argsort(-density, kind="stable")
        taken = np.bincount(owner[ranked[np.cumsum(cost[ranked]) <= self._budget]], minlength=len(self._found))
        for one, count in zip(self._found, taken.tolist(), strict=True):
            one.trim(count)
        self._found = [one for one in self._found if len(one.cost)]


def _difference(
    member: int, place: Place, weight: Tensor, prefix: np.ndarray, energy: Tensor, device: torch.device
) -> _Difference:
    rows, columns = weight.shape
    delta = weight.to(device).double() - torch.from_numpy(numbers(prefix, place.dtype)).to(device)
    scaled = delta * energy.to(device).sqrt()
    values, vectors = torch.linalg.eigh(scaled @ scaled.T)  # ascending
    gains = values.flip(0).clamp_min(0).cpu().numpy()
    total = float(gains.sum())
    missing = total - np.cumsum(gains)
    needed = 0 if not total > 0 else int(np.argmax(missing <= NEGLIGIBLE * total)) + 1
    word = prefix.dtype.itemsize
    each = rank_bytes(rows, columns)
    smaller = max(0, rows * columns * word - 1) // each  # the highest rank that takes less than the matrix
    rank, whole = min(needed, smaller), needed > smaller
    outputs = vectors.flip(1)[:, :rank]
    inputs = outputs.T @ delta
    cost = np.full(rank, each, dtype=np.int64)
    worth = gains[:rank]
    full = None
    if whole:
        full = _words(weight)
        cost = np.append(cost, rows * columns * word - rank * each)
        worth = np.append(worth, gains[rank:].sum())
    low = low_rank(outputs.cpu().numpy(), inputs.cpu().numpy())
    return _Difference(member, place.name, low, full, np.minimum.accumulate(worth / cost), cost)


def _words(weight: Tensor) -> np.ndarray:
    """A weight in the checkpoint's dtype as raw words."""
    size = weight.element_size()
    return weight.contiguous().view(torch.uint8).numpy().view(f"u{size}")


def budget_of(checkpoint: Checkpoint) -> int:
    """Bytes for the repairs of all members."""
    return int(REPAIR_SHARE * sum(info.nbytes for info in checkpoint.tensors.values()))
