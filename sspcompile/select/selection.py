"""What a build decides, as one value: what is kept, by which score, what was tried, what it costs, and the repair."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice

import numpy as np
import torch

from sspcompile.criteria.block_influence import influence_of
from sspcompile.errors import InputError, UnsupportedModelError
from sspcompile.families import Geometry
from sspcompile.model.blocks import ROUNDINGS
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.divergence import Divergence
from sspcompile.prepare.toolkit import Toolkit
from sspcompile.progress import Progress, silent, stage_of
from sspcompile.repair.repair import Repair
from sspcompile.request.options import AUTO
from sspcompile.request.request import Request
from sspcompile.request.rounding import Rounded
from sspcompile.request.splits import Holding
from sspcompile.select.allowed import Allowed
from sspcompile.select.baselines import Baseline, Rival, baselines_of, rivals
from sspcompile.select.budget import Budget
from sspcompile.select.floor import Floor, demand_held, lost, refused, smallest_within
from sspcompile.select.judging import Candidate, Decision, Judge, Judging, Reported, decide
from sspcompile.select.reading import RATE, Reading, choices_for, held, read_through, within
from sspcompile.select.scoring import Ranking, measured_rankings, reads_cache
from sspcompile.select.search import Masks, Searched, Tried, best_of, masks_of
from sspcompile.select.texts import Texts
from sspcompile.slicing.depth import least_influence, least_runs
from sspcompile.slicing.latency import LatencyTable
from sspcompile.slicing.layouts import Choice
from sspcompile.slicing.mask import HeadMask, Layout, kept_of
from sspcompile.slicing.plan import host_of

# Channels against heads: what the rates below are to find out at one size, and how many shapes of a uniform layout.
RATES = (RATE, RATE / 2, 2 * RATE)
SHAPES = 2
# Of whole layers: runs of neighbours that are compared with the layers of least influence.
RUNS = 2


@dataclass(frozen=True)
class Spared:
    """A protected domain: the share of next tokens that may change hands, and what the finished cut does on texts that
    decided (`guard`) and on others (`judge`).
    """

    domain: str
    max_loss: float
    guard: Divergence
    judge: Divergence


@dataclass(frozen=True)
class Selection:
    """Everything that a build decided about a model, and what that was decided on.

    `mask` names every kept unit, the score that ranked them and the scenario they are for; `repair` is what the kept
    ones are refitted to, None for none. `cost` is the divergence from the dense model on texts that decided nothing,
    `without_repair` the same of the mask alone, `with_repair` repaired where a repair was fitted, kept or not.
    `floor` says how a bound on the loss became a budget, None where the budget was given. `decision` holds the layouts
    that were measured, `tried` the masks that were compared on the way (best first, empty
    where there was one), `baselines` what else could have been cut at this budget. `judged` are the texts that
    decided nothing, `probes` token ids [prompts][tokens] of some of them, to prove the cut with. `spared` has a value
    for every protected domain. `rounded` is what the kept ones are refitted to where the cut will be rounded.
    """

    reading: Reading
    mask: HeadMask
    repair: Repair | None
    cost: Reported
    without_repair: Reported
    with_repair: Reported | None
    floor: Floor | None
    decision: Decision
    tried: tuple[Tried, ...]
    baselines: tuple[Baseline, ...]
    judged: Judging
    probes: tuple[tuple[int, ...], ...]
    spared: tuple[Spared, ...] = ()
    rounded: Repair | None = None


def select(
    request: Request,
    toolkit: Toolkit,
    loaded: LoadedModel,
    *,
    dtype: torch.dtype,
    progress: Progress = silent,
    table: LatencyTable | None = None,
) -> Selection:
    """Decide what stays of a model for a scenario, by measuring masks against the dense model.

    `dtype` is the one that refitted weights will be written in: what is measured is what is written. `table`: what a
    bound on time counts by. Raises BudgetError
    for a budget below the floors and for bounds on the loss that no mask is within, and what `read_through` and
    `choices_for` raise.
    """
    texts = Texts(loaded, request.options)
    reading = read_through(request, toolkit, loaded, texts, progress, build=True, table=table)
    judge = Judge(loaded, reading.splits, request.options, texts, dtype=dtype, progress=progress)
    reading, floor, found = _allowed(judge, reading, toolkit)
    best, chosen = found.best, found.chosen
    without_repair = judge.reported(best.choice.units)
    with_repair = judge.reported(best.choice.units, chosen.repair) if chosen.repair is not None else None
    pairs = zip(found.asked, found.fitted, strict=True)
    costs = [judge.reported(rival.choice.units, repair) for rival, repair in pairs]
    return Selection(
        reading=reading,
        mask=mask_of(reading, loaded, best.choice, chosen.layout, best.ranking, best.tried, floor),
        repair=chosen.final_repair,
        cost=with_repair if with_repair is not None and chosen.keeps_repair else without_repair,
        without_repair=without_repair,
        with_repair=with_repair,
        floor=floor,
        decision=found.decision,
        tried=best.tried,
        baselines=baselines_of(found.asked, costs, judge.seed),
        judged=judge.judged(),
        probes=tuple(map(tuple, judge.probes())),
        spared=_spared(judge, chosen, request.options.protect or {}),
        rounded=_rounded(judge, chosen, request.options.quantize),
    )


def _rounded(judge: Judge, chosen: Candidate, precision: Rounded | None) -> Repair | None:
    if precision is None:
        return None
    return judge.rounded(chosen.choice.units, chosen.final_repair, ROUNDINGS[precision])


@dataclass(frozen=True)
class _Settled:
    """What was chosen at a budget, and the baselines at that budget with the repairs to come, in their order."""

    best: Searched
    chosen: Candidate
    decision: Decision
    asked: Sequence[Rival]
    fitted: Iterator[Repair | None]


def _allowed(judge: Judge, reading: Reading, toolkit: Toolkit) -> tuple[Reading, Floor | None, _Settled]:
    """What is chosen within the budget and the bounds on the loss, with the reading of the budget that it came to."""
    allowed, budget = Allowed.by(reading.options), reading.budget
    if not allowed.of_scenario:
        found = _settled(judge, reading, toolkit, None)
        if allowed.protect:
            demand_held(judge, reading, found.chosen, allowed)
        return reading, None, found
    floor, asked = smallest_within(judge, reading, allowed), reading
    tried = {one.kept: one for one in floor.tried}
    while True:
        reading = replace(asked, budget=budget.at(floor.keep))
        found = _settled(judge, reading, toolkit, floor)
        left = lost(judge, found.chosen, floor.keep)
        if allowed.excess(left) <= 0:
            return reading, floor, found
        tried[floor.keep] = left
        # Refitted to all texts it costs less than to a part of them, but for chance.
        larger = floor.larger(floor.keep)
        if larger is None:
            raise refused(judge, asked, allowed, tuple(tried.values()))
        floor = replace(floor, keep=larger, failed=floor.keep)


def _spared(judge: Judge, chosen: Candidate, protect: Mapping[str, float]) -> tuple[Spared, ...]:
    units, repair = chosen.choice.units, chosen.final_repair
    guard, judged = judge.protected("guard", units, repair), judge.protected("judge", units, repair)
    return tuple(Spared(name, most, guard[name], judged[name]) for name, most in protect.items())


def _settled(judge: Judge, reading: Reading, toolkit: Toolkit, floor: Floor | None) -> _Settled:
    searched, decided = _compared(judge, reading, floor)
    layout = decided.chosen.layout if decided is not None else next(iter(searched))
    best = searched[layout]
    asked = rivals(reading, toolkit, judge, layout)
    masks = [best.choice, *(rival.choice for rival in asked)]
    fitted = judge.fitted_to_all([choice.units for choice in masks], "this build and its baselines")
    chosen = judge.candidate(layout, best.choice, next(fitted))
    decision = Decision(
        chosen,
        decided.candidates if decided is not None else {layout: chosen},
        decided.uniform_cost if decided is not None else None,
        spares=decided is not None and decided.spares,
    )
    return _Settled(best, chosen, decision, asked, fitted)


def _compared(judge: Judge, reading: Reading, floor: Floor | None) -> tuple[dict[Layout, Searched], Decision | None]:
    """The best mask of every layout in question, and the layout that the guard texts decide for, if there are two."""
    masks = masks_for(reading, judge)
    if floor is not None and len(masks) > 1:
        may_hold = partial(_may_hold, budget=reading.budget, floor=floor, g=judge.loaded.geometry)
        masks = {
            layout: some
            for layout, some in masks.items()
            if layout == "per-layer" or any(may_hold(choice) for _, choice in some)
        }
    if sum(map(len, masks.values())) == 1:
        return {layout: Searched(*some[0], None, ()) for layout, some in masks.items()}, None
    found = best_of(judge, masks)
    decided = None
    if len(found) > 1:
        candidates = {name: judge.candidate(name, one.choice, one.repair) for name, one in found.items()}
        decided = decide(candidates, _barred(judge, candidates, Allowed(None, reading.options.protect or {})))
        compared = {name: replace(one, repair=None) for name, one in candidates.items()}
        decided = replace(decided, chosen=replace(decided.chosen, repair=None), candidates=compared)
    # What is chosen is repaired anew, on all texts. Repairs of a model of 7 B parameters are 4.5 GB each.
    return {layout: replace(one, repair=None) for layout, one in found.items()}, decided


def _barred(judge: Judge, candidates: Mapping[Layout, Candidate], allowed: Allowed) -> list[Layout]:
    """The layouts that lose too much of a protected domain."""
    if not allowed.protect:
        return []
    return [name for name, one in candidates.items() if allowed.excess(lost(judge, one, one.choice.ratio)) > 0]


def _may_hold(choice: Choice, budget: Budget, floor: Floor, g: Geometry) -> bool:
    """Whether a uniform mask keeps more than a per-layer one that lost too much; a smaller one would lose more."""
    return budget.share(choice, g) > floor.failed


def masks_for(reading: Reading, judge: Judge) -> dict[Layout, Masks]:
    """The masks that are compared for every layout in question; one each where the score was given.

    Raises BudgetError, UnsupportedModelError and InputError like `choices_for`.
    """
    geometry, options = judge.loaded.geometry, reading.options
    choices = choices_for(reading, geometry)
    masks: dict[Layout, Masks] = {layout: ((reading.ranking, choice),) for layout, choice in choices.items()}
    cut = [layout for layout, choice in choices.items() if not choice.units.everything]
    if options.criterion != AUTO or not cut:
        return masks
    if reading.scores.distances is not None:
        return masks | {layout: _shallow_masks(reading, geometry, reading.scores.distances) for layout in cut}
    if reading.scores.influence is not None:
        return masks
    if reading.budget.bounds:
        return masks | {layout: _sized_masks(reading, geometry, layout) for layout in cut}
    ranked = [reading.ranking]
    if reads_cache(reading.scores.source):
        report = stage_of(judge.progress, "head scores on the texts of this build")
        ranked += measured_rankings(
            judge.loaded, judge.sentences, judge.seed, options.granularity, report, repair=options.repair
        )[:1]

    def holds(layout: Layout, choice: Choice) -> bool:
        try:
            host_of(geometry, choice.shapes, options.wanted_host, layout=layout)
        except (UnsupportedModelError, InputError):
            return False
        return True

    found = {
        layout: masks_of(
            ranked,
            layout,
            reading.whitelist,
            reading.budget.keep,
            geometry.kv_heads,
            groups_only=reading.groups_only,
            holds=partial(holds, layout),
        )
        for layout in cut
    }
    return masks | {layout: some for layout, some in found.items() if some}


def _sized_masks(reading: Reading, geometry: Geometry, layout: Layout) -> Masks:
    """The masks of a layout that are compared within bounds on parameters, memory or time: per layer, heads against
    channels at several rates (which are one mask where heads go alone); uniform, several shapes.
    """
    if layout == "per-layer":
        found = [within(reading, geometry, layout, reading.worth(rate))[0] for rate in RATES]
    else:
        found = [*islice(held(reading, geometry, layout), SHAPES)]
    return tuple((reading.ranking, choice) for choice in {choice.units.key: choice for choice in found}.values())


def _shallow_masks(reading: Reading, geometry: Geometry, distances: np.ndarray) -> Masks:
    """The masks without whole layers that are compared: those of least influence, and the runs of least influence."""
    bounds, one = reading.budget.bounds, reading.ranking
    run = replace(one, name=f"{one.name}, one run")
    found = [(one, least_influence(influence_of(distances), geometry, bounds))]
    found += [(run, choice) for choice in islice(least_runs(distances, geometry, bounds), RUNS)]
    masks: dict[bytes, tuple[Ranking, Choice]] = {}
    for ranking, choice in found:
        masks.setdefault(choice.units.key, (ranking, choice))
    return tuple(masks.values())


def _memory(reading: Reading) -> dict[str, int] | None:
    """The bound on memory that was asked for."""
    most, serving = reading.options.max_memory, reading.budget.serving
    return None if most is None or serving is None else {"bytes": most, **asdict(serving)}


def _latency(reading: Reading) -> dict[str, int] | None:
    """The bound on the time of a token that was asked for."""
    most, serving = reading.options.max_latency, reading.budget.serving
    return None if most is None or serving is None else {"nanoseconds": most, **asdict(serving)}


def mask_of(
    reading: Reading,
    loaded: LoadedModel,
    choice: Choice,
    layout: Layout,
    ranking: Ranking | None = None,
    tried: tuple[Tried, ...] = (),
    floor: Floor | None = None,
) -> HeadMask:
    """The mask as a value that can be saved; whitelisted heads are those which the choice kept.

    `ranking` is what the heads were chosen by, where it was not the scenario's own.
    """
    ranking = ranking or reading.ranking
    g, scenario = loaded.geometry, reading.request.scenario
    privileged = np.argwhere(reading.whitelist & choice.kept)
    facts = {
        "name": scenario.name,
        "source": scenario.source,
        **reading.mixture.as_mapping(),
        "importance": reading.scores.as_mapping(),
        "holding": int(Holding.SPACED),
        "without": list(reading.options.without),
        "repair": reading.options.repair,
    }
    if tried:
        facts["tried"] = [asdict(one) for one in tried]
    if floor is not None:
        facts["floor"] = floor.as_mapping()
    if reading.options.protect:
        facts["protect"] = dict(reading.options.protect)
    return HeadMask(
        model=loaded.fingerprint,
        layers=g.layers,
        heads=g.heads,
        kv_heads=g.kv_heads,
        kept=kept_of(choice.kept),
        layout=layout,
        keep_requested=choice.ratio if reading.budget.bounds else reading.budget.keep,
        keep_achieved=choice.ratio,
        scores=tuple(tuple(float(f"{score:.6g}") for score in row) for row in ranking.values),
        whitelist=tuple((int(layer), int(head)) for layer, head in privileged),
        criterion=ranking.name,
        scenario=facts,
        intermediate=g.width,
        channels=choice.kept_channels,
        size_requested=reading.budget.size,
        params_requested=reading.options.max_params,
        memory_requested=_memory(reading),
        latency_requested=_latency(reading),
        removed=choice.units.removed,
        experts=g.mlps if choice.kept_channels is not None else 1,
    )
