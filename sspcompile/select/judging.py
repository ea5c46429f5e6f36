"""Masks measured on held-out texts: each candidate as the masked model, plain and repaired, against the dense one.

What is decided here (layout, repair) is decided on the guard texts; the figures that are reported come from others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import torch

from sspcompile.intervals import Estimate
from sspcompile.model.blocks import Rounding
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.divergence import Divergence, DivergenceAccumulator, compare_divergences
from sspcompile.model.logits import rows_at_once, scored_states
from sspcompile.model.text import Batch, Sentence, batches_of
from sspcompile.progress import Progress, Steps, no_steps, silent, stage_of
from sspcompile.repair.biases import fit_biases
from sspcompile.repair.fitting import fit_repairs
from sspcompile.repair.repair import MIN_PROMPTS, Repair, is_linear, masked
from sspcompile.repair.rounded import rounded
from sspcompile.repair.written import Written
from sspcompile.request.options import Options
from sspcompile.request.prompts import Prompt
from sspcompile.request.splits import Splits
from sspcompile.select.peers import peers
from sspcompile.select.texts import Texts
from sspcompile.slicing.layouts import Choice
from sspcompile.slicing.mask import Kept, Layout
from sspcompile.slicing.sizes import Worth

T = TypeVar("T")

REFITS: Mapping[str, Callable[..., Iterable[Repair]]] = {
    "least-squares": fit_repairs,
    "least-squares-mlp": partial(fit_repairs, mlp=True),
}
FITS: Mapping[str, Callable[..., Iterable[Repair]]] = {**REFITS, "flap-bias": fit_biases}


@dataclass(frozen=True)
class Judging:
    """Texts that judge, and the conversation of each."""

    texts: tuple[Sentence, ...]
    owners: tuple[int, ...]


@dataclass(frozen=True)
class Reported:
    """Divergence from the dense model on held-out texts of the scenario, and of the domains that it is not about
    (None where it is about all).
    """

    own: Divergence
    off: Divergence | None


@dataclass(frozen=True)
class Candidate:
    """A mask on the guard texts: plain and, where a repair was fitted, repaired."""

    layout: Layout
    choice: Choice
    plain: Divergence
    repair: Repair | None
    with_repair: Divergence | None

    @property
    def keeps_repair(self) -> bool:
        """A repair stays unless it makes the guard texts worse: measurably so, or at all where they are too few."""
        return self.with_repair is not None and not _costs_more(compare_divergences(self.with_repair, self.plain))

    @property
    def final(self) -> Divergence:
        return self.with_repair if self.with_repair is not None and self.keeps_repair else self.plain

    @property
    def final_repair(self) -> Repair | None:
        return self.repair if self.keeps_repair else None


class Judge:
    """Holds the texts as batches, and what the dense model says at the scored positions of those that were held out.

    `options.repair` is fitted for every candidate; nothing is with too few texts, or where o_proj's output is not a
    linear part of the residual stream. `dtype` is the one in which repaired tensors will be written.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        splits: Splits,
        options: Options,
        texts: Texts,
        *,
        dtype: torch.dtype,
        progress: Progress = silent,
    ) -> None:
        self.loaded = loaded
        self.splits = splits
        self.seed = options.seed
        repair = options.repair
        possible = len(splits.fit) >= MIN_PROMPTS and (repair == "flap-bias" or is_linear(loaded.geometry))
        self.repair = repair if possible else "none"
        self.dtype = dtype
        self.progress = progress
        self.sentences = texts.continued(splits.fit)

        def held(prompts: Sequence[Prompt]) -> HeldOut:
            return HeldOut(loaded, texts.continued(prompts), self.seed, splits.owners(prompts))

        parts = (("guard", splits.guard), ("judge", splits.judge), ("off", splits.off))
        self._held = {part: held(prompts) for part, prompts in parts if prompts}
        self._protected = {one.name: {"guard": held(one.guard), "judge": held(one.judge)} for one in splits.protected}
        self._plain: dict[bytes, Divergence] = {}
        self._peers: tuple[tuple[str, Worth], ...] = ()

    def guarded(self, kept: Kept, repair: Repair | None = None) -> Divergence:
        """Of the masked model on the texts that decide."""
        return self._held["guard"].divergence(kept, repair)

    def reported(self, kept: Kept, repair: Repair | None = None) -> Reported:
        """Figures on the texts that decide nothing, on the scenario and off it."""
        own, off = self._held["judge"], self._held.get("off")
        return Reported(own.divergence(kept, repair), off.divergence(kept, repair) if off is not None else None)

    def protected(
        self, part: Literal["guard", "judge"], kept: Kept, repair: Repair | None = None
    ) -> Mapping[str, Divergence]:
        """Of every protected domain, on the texts that decide or on those that decide nothing."""
        return {name: held[part].divergence(kept, repair) for name, held in self._protected.items()}

    def probes(self) -> list[list[int]]:
        """Token ids of six of the texts that decide nothing, unpadded, the shortest and the longest among them."""
        rows = [
            batch.input_ids[row][batch.attention_mask[row].bool()].tolist()
            for batch in self._held["judge"].batches
            for row in range(len(batch.rows))
        ]
        return spread(rows)

    def judged(self) -> Judging:
        """The texts of the scenario that decide nothing, with what the dense model is asked to foretell in them."""
        return Judging(self._held["judge"].texts, self._held["judge"].owners)

    def fitted(
        self, masks: Sequence[Kept], batches: Sequence[Batch], report: Steps = no_steps
    ) -> Iterator[Repair | None]:
        """The repairs of masks on other texts than usual; None where there is none.

        Whoever takes them one by one holds no more than a few in memory.
        """
        wanted = [self.repair != "none" and not kept.everything for kept in masks]
        cut = [kept for kept, mend in zip(masks, wanted, strict=True) if mend]
        fit = FITS[self.repair](self.loaded, cut, batches, dtype=self.dtype, progress=report) if cut else ()
        repairs = iter(fit)
        for mend in wanted:
            yield next(repairs) if mend else None

    def fitted_to_all(self, masks: Sequence[Kept], what: str) -> Iterator[Repair | None]:
        """The repairs of masks on all texts that may fit one; `what` they are is shown meanwhile."""
        batches = batches_of(self.loaded, self.sentences)
        return self.fitted(masks, batches, stage_of(self.progress, f"repair ({what})"))

    def fitted_as(self, kept: Kept, written: Written, what: str) -> Repair:
        """The repair of a mask on all texts that may fit one, of which less will be written; see `fit_repairs`."""
        report, batches = stage_of(self.progress, what), batches_of(self.loaded, self.sentences)
        fit = REFITS[self.repair]
        return next(iter(fit(self.loaded, [kept], batches, dtype=self.dtype, written=written, progress=report)))

    def rounded(self, kept: Kept, repair: Repair | None, rounding: Rounding) -> Repair | None:
        """The repair of a mask, on all texts that may fit one, that makes up for a rounding too. None where weights are
        not refitted, and where the guard texts lose more by it, once rounded, than with the usual `repair`.
        """
        if self.repair not in REFITS:
            return None
        report = stage_of(self.progress, "repair (rounded)")
        batches = batches_of(self.loaded, self.sentences)
        fit = fit_repairs(self.loaded, [kept], batches, dtype=self.dtype, rounding=rounding, progress=report)
        knowing = next(fit)
        with rounded(self.loaded, kept, rounding):
            usual, other = self.guarded(kept, repair), self.guarded(kept, knowing)
        return None if _costs_more(compare_divergences(other, usual)) else knowing

    def peers(self, *, channels: bool) -> tuple[tuple[str, Worth], ...]:
        """`select.peers` on the texts that choose, measured once however often a budget is settled."""
        if not self._peers:
            self._peers = tuple(peers(self.loaded, self.sentences, self.progress, channels=channels))
        return self._peers

    def candidate(self, layout: Layout, choice: Choice, repair: Repair | None) -> Candidate:
        """A mask, measured on the guard texts with and without its repair; without one, once per mask."""
        plain, mask = self._plain, choice.units.key
        if mask not in plain:
            plain[mask] = self.guarded(choice.units)
        with_repair = self.guarded(choice.units, repair) if repair is not None else None
        return Candidate(layout, choice, plain[mask], repair, with_repair)


def spread(ordered: Sequence[T]) -> list[T]:
    """Six of many, evenly spaced, the first and the last among them."""
    step = max(1, len(ordered) // 5)
    return [*ordered[::step][:5], *ordered[-1:]]


class HeldOut:
    """Texts, the conversation of each (`owners`, nothing: each its own), and the dense model's states at their scored
    positions.

    A state [d] is what lm_head makes logits [V] of. It is kept in their place, because it is smaller by the factor
    V / d; the logits of a few positions at a time are made again for each comparison.
    """

    def __init__(
        self, loaded: LoadedModel, texts: Sequence[Sentence], seed: int = 0, owners: Sequence[int] = ()
    ) -> None:
        self._loaded = loaded
        self._seed = seed
        self.texts = tuple(texts)
        self.owners = tuple(owners)
        self.batches = batches_of(loaded, texts)
        self._references = [references_of(batch, texts) for batch in self.batches]
        self._dense = [scored_states(loaded, batch) for batch in self.batches]

    @torch.inference_mode()
    def divergence(self, kept: Kept, repair: Repair | None = None) -> Divergence:
        """Of the masked, repaired model from the dense one."""
        loaded, collected = self._loaded, DivergenceAccumulator()
        rows = rows_at_once(loaded)
        with masked(loaded, kept, repair):
            for batch, dense, wanted in zip(self.batches, self._dense, self._references, strict=True):
                owner = torch.tensor(batch.rows)[batch.score_mask.nonzero()[:, 0].cpu()]
                parts = (one.split(rows) for one in (dense, scored_states(loaded, batch), owner, wanted))
                for expected, found, whose, references in zip(*parts, strict=True):
                    collected.add(loaded.logits_of(expected), loaded.logits_of(found), whose, references)
        return collected.result(seed=self._seed, owners=self.owners)


def references_of(batch: Batch, texts: Sequence[Sentence]) -> torch.Tensor:
    """The next token at every scored position of a batch, [N], -1 where the text is the model's own."""
    given = torch.tensor([texts[row].reference for row in batch.rows])[:, None]
    following = batch.input_ids.roll(-1, 1).cpu()
    return torch.where(given, following, -1)[batch.score_mask.cpu()]


@dataclass(frozen=True)
class Decision:
    """The chosen candidate, all that were compared, and what the uniform layout costs (None when only one was asked
    for). Layouts are compared with repairs that a part of the texts fits; the chosen one's is fitted to all of them.
    `spares`: whether it was chosen because the other loses too much of a protected domain.
    """

    chosen: Candidate
    candidates: Mapping[Layout, Candidate]
    uniform_cost: Estimate | None
    spares: bool = False


def decide(candidates: Mapping[Layout, Candidate], barred: Collection[Layout] = ()) -> Decision:
    """Uniform where it costs nothing measurable on the guard texts, per-layer otherwise. Where one of the two is
    `barred` it is the other.
    """
    if len(candidates) == 1:
        return Decision(next(iter(candidates.values())), candidates, None)
    uniform, per_layer = candidates["uniform"], candidates["per-layer"]
    cost = compare_divergences(uniform.final, per_layer.final)
    if len({*barred}) == 1:
        return Decision(per_layer if "uniform" in barred else uniform, candidates, cost, spares=True)
    return Decision(per_layer if _costs_more(cost) else uniform, candidates, cost)


def _costs_more(cost: Estimate) -> bool:
    """Whether a cost is above zero by more than chance; with too few texts for an interval, whether it is at all.

    A few texts carry most of a mean KL, so on a dozen of them its sign alone is close to a coin toss.
    """
    return cost.value > 0 and (cost.measurable or cost.low is None)
