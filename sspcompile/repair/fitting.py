"""Fitting repairs: least squares on o_proj (and down_proj, or those of experts); repair/repair.py has the formulas.

Masks are fitted together: half of what one mask needs are passes of the dense model, which do not depend on it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sspcompile.model import journal
from sspcompile.model.blocks import Rounding
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.hooks import answered, expert_gates, input_of
from sspcompile.model.journal import Arrays
from sspcompile.model.modules import attention, down_proj, o_proj, residual_norm
from sspcompile.model.rounding import rounded_embedding, rounded_inside
from sspcompile.model.streaming import in_memory
from sspcompile.model.text import Batch
from sspcompile.model.weights import tensor_of, weight_of
from sspcompile.progress import Steps, no_steps
from sspcompile.repair.dense import Dense, calls_of
from sspcompile.repair.experts import fit_experts
from sspcompile.repair.repair import Repair, repaired
from sspcompile.repair.systems import LEAST_ENERGY, Normal, System, system_of
from sspcompile.repair.written import RoundedMatrices, Written
from sspcompile.slicing.mask import Kept


class Ridges(NamedTuple):
    """How firmly weights are held where they were, relative to the energy of each input, of which so much of the mean
    counts at `least`.
    """

    o_proj: float
    down_proj: float
    least: float = LEAST_ENERGY


# On SmolLM2-135M 6,000 tokens and 19,000 alike are served best by about these; down_proj has more inputs than they
# excite, so what it was counts for more (benchmarks/repairs.py, docs/quality.md).
RIDGES = Ridges(o_proj=0.3, down_proj=1.0)
# What rounding misses is noise: it would be made out of the faintest inputs, whose weights, grown large, make the scale
# of a whole block coarse.
ROUNDED_RIDGES = RIDGES._replace(least=0.1)
# That the hidden states and weights of the masks of one round may take; what does not fit is fitted in further rounds.
ROUND_BYTES = 1 << 30


def fit_repairs(
    loaded: LoadedModel,
    masks: Sequence[Kept],
    batches: Sequence[Batch],
    *,
    dtype: torch.dtype,
    mlp: bool = False,
    rounding: Rounding | None = None,
    written: Written | None = None,
    ridges: Ridges | None = None,
    progress: Steps = no_steps,
) -> Iterator[Repair]:
    """Refit what lost an input for each mask on the texts of `batches`: o_proj; down_proj where channels went, or the
    attention in front of it or the whole layer behind it, and with `mlp` every down_proj; that of each expert where
    channels of experts went. With a `rounding` o_proj and down_proj are refitted in every layer, to states of the model
    whose matrices are rounded, so that they make up for that too. What is `written` of a refitted matrix is what later
    layers see. Either way matrices come back as they are before they are rounded or written.

    Held are the hidden states of all batches, [B, T, d], twice for the dense model, once per mask and once for the
    layer that is fitted (three times where its experts are), and the weights of the masks of a round. In each round
    every layer runs once dense and once per mask, its MLP once more where down_proj is fitted, and twice more where
    experts are. A round begins when the first of its repairs is asked for. `dtype` is the dtype that the weights will
    be written in.
    """
    mlp = mlp or rounding is not None
    ridges = ridges or (RIDGES if rounding is None else ROUNDED_RIDGES)
    if rounding is not None and written is not None:
        raise ValueError("a rounding says itself what is written")
    written = written if rounding is None else RoundedMatrices(rounding)
    down = any(kept.channels is not None for kept in masks)
    if loaded.geometry.is_dense:
        down = down or mlp or any(kept.removed or kept.silent for kept in masks)
    at_once = masks_at_once(loaded, sum(batch.input_ids.numel() for batch in batches), dtype, down=down)
    rounds = [masks[start : start + at_once] for start in range(0, len(masks), at_once)]
    layers = len(loaded.layers)
    for turn, together in enumerate(rounds):
        before = turn * layers

        def report(done: int, before: int = before) -> None:
            progress(before + done, len(rounds) * layers)

        streams = [_Stream(kept, rounding, written) for kept in together]
        yield from _fit_round(loaded, streams, batches, dtype, ridges, mlp=mlp, report=report)


def masks_at_once(loaded: LoadedModel, tokens: int, dtype: torch.dtype, *, down: bool = False) -> int:
    """How many masks one round fits on texts of so many tokens, padding included; `down`: whether down projections are
    refitted, of experts those of all.
    """
    g = loaded.geometry
    weights = g.layers * g.hidden * (g.heads * g.head_dim + (g.channels if down else 0)) * dtype.itemsize
    return max(1, ROUND_BYTES // max(1, tokens * g.hidden * 4 + weights))


@torch.inference_mode()
def _fit_round(
    loaded: LoadedModel,
    streams: Sequence[_Stream],
    batches: Sequence[Batch],
    dtype: torch.dtype,
    ridges: Ridges,
    *,
    mlp: bool,
    report: Callable[[int], None],
) -> list[Repair]:
    dense = Dense(loaded, batches)
    rounding = streams[0].rounding  # the same for all
    entered = dense.hidden if rounding is None else _entered(loaded, batches, rounding)
    for stream in streams:
        stream.hidden = list(entered)
    masks, written = [stream.kept for stream in streams], [stream.written.key for stream in streams if stream.written]
    kept_state = journal.current().state("repair", loaded, [batches, masks, str(dtype), list(ridges), mlp, *written])
    stand = kept_state.read()
    begun = 0
    if stand is not None:
        begun = _go_on(stand, dense, streams, dtype)
        report(begun)
    for index in range(begun, len(loaded.layers)):
        with in_memory(loaded.layers[index]):  # read once, not for every batch and every expert
            dense.advance(index)
            for stream in streams:
                stream.advance(index, dense, dtype, ridges, mlp=mlp)
        kept_state.keep(partial(_stand, index + 1, dense, streams))
        report(index + 1)
    return [Repair(stream.weights, down=stream.down, experts=stream.experts) for stream in streams]


def _stand(layers: int, dense: Dense, streams: Sequence[_Stream]) -> Arrays:
    """All that the layers behind the first `layers` are fitted from, and what those were refitted to."""
    ended = layers == len(dense.loaded.layers)
    found = {} if ended else {f"dense.{number}": _array(hidden) for number, hidden in enumerate(dense.hidden)}
    for place, stream in enumerate(streams):
        if stream.began(layers) and not ended:  # before the first cut the states are the dense model's
            found |= {f"{place}.hidden.{number}": _array(hidden) for number, hidden in enumerate(stream.hidden)}
        found |= {f"{place}.weights.{index}": _array(weight) for index, weight in stream.weights.items()}
        found |= {f"{place}.down.{index}": _array(weight) for index, weight in stream.down.items()}
        for index, own in stream.experts.items():
            found |= {f"{place}.experts.{index}.{number}": _array(weight) for number, weight in own.items()}
    return found | {"layers": np.array([layers])}


def _go_on(stand: Arrays, dense: Dense, streams: Sequence[_Stream], dtype: torch.dtype) -> int:
    """Bring all to where a `_stand` was taken; gives the number of layers that are done."""
    layers = int(stand["layers"][0])
    if layers < len(dense.loaded.layers):
        dense.hidden = [
            _tensor(stand[f"dense.{number}"], like.dtype).to(like.device) for number, like in enumerate(dense.hidden)
        ]
    for place, stream in enumerate(streams):
        stream.hidden = [
            _tensor(stand[name], like.dtype).to(like.device) if (name := f"{place}.hidden.{number}") in stand else like
            for number, like in enumerate(dense.hidden)
        ]
        for index in range(layers):
            if (name := f"{place}.weights.{index}") in stand:
                stream.weights[index] = _tensor(stand[name], dtype)
            if (name := f"{place}.down.{index}") in stand:
                stream.down[index] = _tensor(stand[name], dtype)
            for number in range(dense.loaded.geometry.experts):
                if (name := f"{place}.experts.{index}.{number}") in stand:
                    stream.experts.setdefault(index, {})[number] = _tensor(stand[name], dtype)
    return layers


def _array(tensor: Tensor) -> np.ndarray:
    """NumPy has no bfloat16: its words stand for it."""
    tensor = tensor.cpu()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Out of an `_array`, in memory of torch's own: results depend on how it is aligned."""
    return torch.from_numpy(array).clone().view(dtype)


def _entered(loaded: LoadedModel, batches: Sequence[Batch], rounding: Rounding) -> list[Tensor]:
    """What enters the first layer, [B, T, d] per batch, where embeddings are looked up in a rounded table."""
    with rounded_embedding(loaded, rounding, tied=loaded.geometry.tied):
        return [calls_of(loaded, batch)[0].hidden for batch in batches]


@dataclass
class _Stream:
    """One mask on its way through the layers: its hidden states, and the weights that were fitted so far."""

    kept: Kept
    rounding: Rounding | None = None
    written: Written | None = None
    hidden: list[Tensor] = field(default_factory=list)
    weights: dict[int, Tensor] = field(default_factory=dict)
    down: dict[int, Tensor] = field(default_factory=dict)
    experts: dict[int, dict[int, Tensor]] = field(default_factory=dict)

    def began(self, index: int) -> bool:
        """Whether something was cut in front of a layer. Before, all states are the dense model's own."""
        if self.weights or self.down or not all(map(self.kept.attends, range(index))):
            return True
        return self.kept.channels is not None and not bool(self.kept.channels[:index].all())

    def advance(self, index: int, dense: Dense, dtype: torch.dtype, ridges: Ridges, *, mlp: bool) -> None:
        """Fit a layer to the dense one, and take the hidden states through what came out; around a removed one."""
        if not self.kept.stays(index):
            return
        loaded = dense.loaded
        # A layer computes where its weights are; the one before may lie on another device.
        self.hidden = [one.to(after.device) for one, after in zip(self.hidden, dense.after, strict=True)]
        columns = torch.from_numpy(np.repeat(self.kept.heads[index], loaded.geometry.head_dim))
        channels = None if self.kept.channels is None else torch.from_numpy(self.kept.channels[index])
        narrower = channels is not None and not channels.all()
        attends, removed = self.kept.attends(index), self._removed_behind(index)
        refits = attends and (self.rounding is not None or self.began(index) or not bool(columns.all()))
        mends = (removed > 0 or not attends) and loaded.geometry.is_dense
        if attends and not refits and not narrower and not mends:
            self.hidden = list(dense.hidden)
            return
        layer = loaded.layers[index]
        fits_down = loaded.geometry.is_dense and (narrower or mlp or mends)
        targets = dense.beyond(index, removed) if fits_down or narrower else []
        with rounded_inside(layer, self.rounding) if self.rounding is not None else contextlib.nullcontext():
            attended = self._attend(index, dense) if attends else [torch.zeros_like(hidden) for hidden in self.hidden]
            if refits:
                self.weights[index] = self._refit_attention(index, dense, attended, columns, ridges).to(dtype)
            seen = {index: self._seen(index, self.weights[index], columns, down=False)} if refits else {}
            with repaired(loaded, Repair(seen)):
                # Inputs of o_proj up to here, and outputs from here on: each batch in the place of the other.
                for number, x in enumerate(attended if attends else ()):
                    attended[number] = o_proj(layer)(x)
            if fits_down:
                full = self._refit_mlp(index, dense, attended, channels, targets, ridges)
                self.down[index] = full.to(dtype).contiguous()
            elif channels is not None and narrower:
                kept = channels.view(loaded.geometry.mlps, -1)
                firm = ridges.down_proj, ridges.least
                fitted = fit_experts(dense, index, self.hidden, attended, targets, kept, *firm)
                self.experts[index] = {number: full.to(dtype).contiguous() for number, full in fitted}
            if layer is not loaded.layers[-1]:
                self._leave(index, dense, attended, channels)

    def _leave(self, index: int, dense: Dense, outputs: Sequence[Tensor], channels: Tensor | None) -> None:
        """Take the hidden states out of a layer whose attention puts out `outputs`."""
        g, layer = dense.loaded.geometry, dense.loaded.layers[index]
        down = {index: self._seen(index, self.down[index], channels, down=True)} if index in self.down else {}
        # What is refitted has zeros in the place of channels that went; an expert that no text visits stays as it was.
        gates = None if g.is_dense or channels is None else channels.view(g.mlps, g.width)
        refitted = {
            number: self._seen(index, weight, None if gates is None else gates[number], down=True)
            for number, weight in self.experts.get(index, {}).items()
        }
        with (
            expert_gates(layer, gates) if gates is not None else contextlib.nullcontext(),
            repaired(dense.loaded, Repair({}, down=down, experts={index: refitted} if refitted else {})),
        ):
            for number, output in enumerate(outputs):
                with answered(attention(layer), output):
                    self.hidden[number] = dense.run(index, number, self.hidden[number])

    def _seen(self, index: int, weight: Tensor, kept: Tensor | None, *, down: bool) -> Tensor:
        """A refitted matrix as what comes behind it sees it: as it will be written."""
        return weight if self.written is None else self.written.of(index, weight, down=down, kept=kept)

    def _removed_behind(self, index: int) -> int:
        """How many layers right behind one are removed."""
        behind = range(index + 1, len(self.kept.heads))
        return next((place for place, layer in enumerate(behind) if self.kept.stays(layer)), len(behind))

    def _attend(self, index: int, dense: Dense) -> list[Tensor]:
        """The inputs of o_proj, [B, T, heads * D] per batch; no fit of this layer changes them."""
        found = []
        for number, hidden in enumerate(self.hidden):
            with input_of(o_proj(dense.loaded.layers[index]), "o_proj", then_end=True) as seen:
                dense.run(index, number, hidden)
            found.append(seen[0])
        return found

    def _refit_attention(
        self, index: int, dense: Dense, inputs: Sequence[Tensor], columns: Tensor, ridges: Ridges
    ) -> Tensor:
        """o_proj [hidden, heads * D] with refitted kept columns and zeros elsewhere: a removed head adds nothing."""
        projection = o_proj(dense.loaded.layers[index])
        weight, bias = weight_of(projection), tensor_of(projection, "bias")
        columns = columns.to(weight.device)
        system = Normal(int(columns.sum()), projection.out_features, weight.device)
        for number, (x, hidden) in enumerate(zip(inputs, self.hidden, strict=True)):
            self._add(system, x[..., columns], hidden, bias, number, dense, dense.after[number])
        full = torch.zeros(weight.shape, dtype=torch.float64)
        full[:, columns.cpu()] = system.solve(weight[:, columns].T, ridges.o_proj, ridges.least).T.cpu()
        return full

    def _refit_mlp(
        self,
        index: int,
        dense: Dense,
        outputs: Sequence[Tensor],
        channels: Tensor | None,
        targets: Sequence[Tensor],
        ridges: Ridges,
    ) -> Tensor:
        """down_proj [hidden, intermediate] of a layer whose attention puts out `outputs` and which should put out
        `targets`, [B, T, d] per batch; zeros in the columns of channels that do not stay.
        """
        layer = dense.loaded.layers[index]
        projection = down_proj(layer)
        weight, bias = weight_of(projection), tensor_of(projection, "bias")
        columns = torch.ones(projection.in_features, dtype=torch.bool) if channels is None else channels
        there = columns.to(weight.device)
        rows = sum(map(len, dense.weights))
        system = system_of(rows, int(columns.sum()), projection.out_features, weight.device)
        for number, hidden in enumerate(self.hidden):
            with (
                answered(attention(layer), outputs[number]),
                input_of(residual_norm(layer), "residual norm") as after,
                input_of(projection, "down_proj", then_end=True) as seen,
            ):
                dense.run(index, number, hidden)
            self._add(system, seen[0][..., there], after[0], bias, number, dense, targets[number])
        full = torch.zeros(weight.shape, dtype=torch.float64)
        full[:, columns] = system.solve(weight[:, there].T, ridges.down_proj, ridges.least).T.cpu()
        return full

    def _add(
        self,
        system: System,
        inputs: Tensor,
        residual: Tensor,
        bias: Tensor | None,
        number: int,
        dense: Dense,
        target: Tensor,
    ) -> None:
        """One batch: the projection's inputs, and what it has to add to the residual stream to get to `target`, where
        the dense model is.
        """
        missing = dense.missing(residual, target)
        if bias is not None:
            missing = missing - bias
        real = dense.real[number].to(inputs.device)
        system.add(inputs[real], missing[real], dense.weights[number])
