"""Masks measured on held-out texts: each candidate as the masked model, plain and repaired, against the dense one.

What is decided here (layout, repair) is decided on the guard texts; the figures that are reported come from others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sspcompile.intervals import Estimate
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.divergence import Divergence, DivergenceAccumulator, compare_divergences
from sspcompile.model.hooks import head_gates
from sspcompile.model.text import Batch, batches_of, continued
from sspcompile.progress import Progress, Steps, no_steps, silent, stage_of
from sspcompile.repair.fitting import fit_biases, fit_repairs
from sspcompile.repair.repair import MIN_PROMPTS, Repair, is_linear, repaired
from sspcompile.request.options import Options
from sspcompile.request.splits import Splits
from sspcompile.slicing.layouts import Choice
from sspcompile.slicing.mask import Layout

FITS: Mapping[str, Callable[..., Iterable[Repair]]] = {
    "least-squares": fit_repairs,
    "least-squares-mlp": partial(fit_repairs, mlp=True),
    "flap-bias": fit_biases,
}


@dataclass(frozen=True)
class Figures:
    """Divergence from the dense model on the texts that decide, and on those that are only reported."""

    guard: Divergence
    judge: Divergence


@dataclass(frozen=True)
class Reported:
    """Divergence from the dense model on held-out texts of the scenario, and of the domains that it is not about
    (None where it is about all).
    """

    own: Divergence
    off: Divergence | None


@dataclass(frozen=True)
class Candidate:
    """One layout's mask: measured plain and, where a repair was fitted, repaired."""

    layout: Layout
    choice: Choice
    plain: Figures
    repair: Repair | None
    with_repair: Figures | None

    @property
    def keeps_repair(self) -> bool:
        """A repair stays unless it makes the guard texts worse: measurably so, or at all where they are too few."""
        return self.with_repair is not None and not _costs_more(
            compare_divergences(self.with_repair.guard, self.plain.guard)
        )

    @property
    def final(self) -> Figures:
        return self.with_repair if self.with_repair is not None and self.keeps_repair else self.plain

    @property
    def final_repair(self) -> Repair | None:
        return self.repair if self.keeps_repair else None


class Judge:
    """Holds the texts as batches, and the dense model's logits at the scored positions of those that were held out.

    `options.repair` is fitted for every candidate; nothing is with too few texts, or where o_proj's output is not a
    linear part of the residual stream. `dtype` is the one in which repaired tensors will be written.
    """

    def __init__(
        self, loaded: LoadedModel, splits: Splits, options: Options, *, dtype: torch.dtype, progress: Progress = silent
    ) -> None:
        self.loaded = loaded
        self.splits = splits
        self.seed = options.seed
        repair = options.repair
        possible = len(splits.fit) >= MIN_PROMPTS and (repair == "flap-bias" or is_linear(loaded.geometry))
        self.repair = repair if possible else "none"
        self.dtype = dtype
        self.progress = progress
        parts = {"fit": splits.fit, "guard": splits.guard, "judge": splits.judge, "off": splits.off}
        self.sentences, *others = (
            continued(
                loaded,
                part,
                options.continuation_tokens,
                options.max_tokens,
                progress=stage_of(progress, f"continuations ({name})"),
            )
            for name, part in parts.items()
        )
        self.fit, self.guard, self.held, self.off = (batches_of(loaded, part) for part in (self.sentences, *others))
        self._dense = {
            part: [logits_at(loaded, batch) for batch in getattr(self, part)] for part in ("guard", "held", "off")
        }

    def figures(self, kept: np.ndarray, repair: Repair | None = None) -> Figures:
        """Of the masked model, `kept` bool [layers, heads]."""
        return Figures(
            *(
                divergence_of(self.loaded, kept, repair, getattr(self, part), self._dense[part], seed=self.seed)
                for part in ("guard", "held")
            )
        )

    def reported(self, candidate: Candidate) -> Reported:
        """A candidate's figures on the texts that decide nothing, on the scenario and off it."""
        off = None
        if self.off:
            off = divergence_of(
                self.loaded, candidate.choice.kept, candidate.final_repair, self.off, self._dense["off"], seed=self.seed
            )
        return Reported(candidate.final.judge, off)

    def probes(self) -> list[list[int]]:
        """Token ids of six of the texts that decide nothing, unpadded, the shortest and the longest among them."""
        rows = [
            batch.input_ids[row][batch.attention_mask[row].bool()].tolist()
            for batch in self.held
            for row in range(len(batch.rows))
        ]
        step = max(1, len(rows) // 5)
        return rows[::step][:5] + rows[-1:]

    def fitted(
        self, masks: Sequence[np.ndarray], batches: Sequence[Batch], report: Steps = no_steps
    ) -> Iterator[Repair | None]:
        """The repairs of masks (each bool [layers, heads]) on other texts than usual; None where there is none.

        Whoever takes them one by one holds no more than a few in memory.
        """
        wanted = [self.repair != "none" and not kept.all() for kept in masks]
        cut = [kept for kept, mend in zip(masks, wanted, strict=True) if mend]
        fit = FITS[self.repair](self.loaded, cut, batches, dtype=self.dtype, progress=report) if cut else ()
        repairs = iter(fit)
        for mend in wanted:
            yield next(repairs) if mend else None

    def candidates(self, choices: Sequence[tuple[Layout, Choice]], what: str) -> Iterator[Candidate]:
        """Measure choices, and once more with a repair when repairs are on and something was cut.

        `what` they are is shown while they are repaired.
        """
        fitted = self.fitted(
            [choice.kept for _, choice in choices], self.fit, stage_of(self.progress, f"repair ({what})")
        )
        for (layout, choice), repair in zip(choices, fitted, strict=True):
            with_repair = self.figures(choice.kept, repair) if repair is not None else None
            yield Candidate(layout, choice, self.figures(choice.kept), repair, with_repair)


def divergence_of(
    loaded: LoadedModel,
    kept: np.ndarray,
    repair: Repair | None,
    batches: Sequence[Batch],
    dense: Sequence[Tensor],
    *,
    seed: int = 0,
) -> Divergence:
    """Of the masked, repaired model from the dense one, whose logits at the scored positions are `dense`."""
    collected = DivergenceAccumulator()
    gates = torch.from_numpy(kept).float().to(loaded.device)
    with head_gates(loaded, gates), repaired(loaded, repair):
        for batch, expected in zip(batches, dense, strict=True):
            owner = torch.tensor(batch.rows)[batch.score_mask.nonzero()[:, 0].cpu()]
            collected.add(expected, logits_at(loaded, batch), owner)
    return collected.result(seed=seed)


def logits_at(loaded: LoadedModel, batch: Batch) -> Tensor:
    """Logits at the scored positions, [S, V] fp32 on the CPU."""
    return loaded.scored_logits(batch.input_ids, batch.attention_mask, batch.score_mask).cpu()


@dataclass(frozen=True)
class Decision:
    """The chosen candidate, all candidates, and what the uniform layout costs (None when only one was asked for)."""

    chosen: Candidate
    candidates: Mapping[Layout, Candidate]
    uniform_cost: Estimate | None


def decide(candidates: Mapping[Layout, Candidate]) -> Decision:
    """Uniform where it costs nothing measurable on the guard texts, per-layer otherwise."""
    if len(candidates) == 1:
        return Decision(next(iter(candidates.values())), candidates, None)
    uniform, per_layer = candidates["uniform"], candidates["per-layer"]
    cost = compare_divergences(uniform.final.guard, per_layer.final.guard)
    return Decision(per_layer if _costs_more(cost) else uniform, candidates, cost)


def _costs_more(cost: Estimate) -> bool:
    """Whether a cost is above zero by more than chance; with too few texts for an interval, whether it is at all.

    A few texts carry most of a mean KL, so on a dozen of them its sign alone is close to a coin toss.
    """
    return cost.value > 0 and (cost.measurable or cost.low is None)
