"""What else could have been cut: at the same budget, in the same layout, from the same texts, with the same repair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sspcompile.criteria.block_influence import influence_of
from sspcompile.criteria.chance import first_layer_kept
from sspcompile.families import Geometry
from sspcompile.model.divergence import average
from sspcompile.prepare.toolkit import Toolkit
from sspcompile.progress import stage_of
from sspcompile.request.options import Baselines, Whole
from sspcompile.select.budget import merit
from sspcompile.select.judging import Judge, Reported
from sspcompile.select.mixture import head_scores
from sspcompile.select.peers import PEERS, scored_by_peers
from sspcompile.select.reading import Reading, within
from sspcompile.select.scoring import CACHED_BASELINES, Source, layer_distances, reads_cache, score_key
from sspcompile.slicing.depth import least_influence, shallowest
from sspcompile.slicing.layouts import Choice
from sspcompile.slicing.mask import Layout
from sspcompile.slicing.sizes import Worth, channel_parameters, head_share

# Draws of random heads in the table of all baselines.
SEEDS = 3
WHOLE_LAYERS = "whole layers (ShortGPT)"
Role = Literal["random", "domain-free", "criterion"]


@dataclass(frozen=True)
class Baseline:
    """Another choice of heads, and how far it is from the dense model."""

    role: Role
    name: str
    cost: Reported


@dataclass(frozen=True)
class Rival:
    """A baseline before it is measured; of several with one name the mean is reported."""

    role: Role
    name: str
    choice: Choice


def rivals(reading: Reading, toolkit: Toolkit, judge: Judge, layout: Layout) -> list[Rival]:
    """Nothing, a few that need no pass for their scores, or all, as the options say."""
    geometry = judge.loaded.geometry
    if reading.options.whole is not None:
        return [*_random_layers(reading, geometry, reading.options.whole)]
    if reading.budget.bounds:
        worths = _worths(reading, judge)
    else:
        worths = ((role, name, Worth(values, None)) for role, name, values in _scores(reading, toolkit))
    found = [Rival(role, name, within(reading, geometry, layout, worth)[0]) for role, name, worth in worths]
    return [*found, *_whole_layers(reading, judge)]


def _random_layers(reading: Reading, g: Geometry, whole: Whole) -> Iterator[Rival]:
    """Within the same bounds, layers, or their attention, by chance behind the first."""
    wanted = reading.options.baselines
    draws = {"none": 0, "few": 1, "all": SEEDS}[wanted]
    for number in range(draws):
        scores = first_layer_kept((g.layers, 1), reading.options.seed + number)[:, 0]
        name = f"random {whole}, first layer kept" + (f" ({draws}x)" if draws > 1 else "")
        yield Rival("random", name, least_influence(scores, g, reading.budget.bounds, whole))


def _whole_layers(reading: Reading, judge: Judge) -> Iterator[Rival]:
    """Within the same bounds on parameters, the layers of least influence removed whole; nothing where one layer alone
    has more.
    """
    bounds, g = reading.budget.bounds, judge.loaded.geometry
    if reading.options.baselines != "all" or reading.budget.unit != "parameters":
        return
    if any(bound.most < shallowest(bound.measure) for bound in bounds):
        return
    report = stage_of(judge.progress, "influence of layers (baseline)")
    influence = influence_of(layer_distances(judge.loaded, judge.sentences, report))
    yield Rival("criterion", WHOLE_LAYERS, least_influence(influence, g, bounds))


def _worths(reading: Reading, judge: Judge) -> Iterator[tuple[Role, str, Worth]]:
    """Role, name and worth of every baseline within the same bounds."""
    wanted, ours, g = reading.options.baselines, reading.worth(), judge.loaded.geometry
    if wanted == "none":
        return
    draws = SEEDS if wanted == "all" else 1
    for number in range(draws):
        seed = reading.options.seed + number
        heads = head_share(g) * first_layer_kept(reading.merit.shape, seed)
        channels = None
        if ours.channels is not None:
            channels = channel_parameters(g) / g.mlps * first_layer_kept(ours.channels.shape, seed)
        yield "random", "random, first layer kept" + (f" ({draws}x)" if draws > 1 else ""), Worth(heads, channels)
    if wanted == "all" and ours.channels is not None:
        for ranking in reading.scores.others:
            yield "criterion", f"criterion {ranking.name}", Worth(ranking.values, ranking.channels)
    if wanted == "all" and scored_by_peers(g, ours.channels is not None):
        for name, worth in judge.peers(channels=ours.channels is not None):
            yield "criterion", name, worth


def _scores(reading: Reading, toolkit: Toolkit) -> Iterator[tuple[Role, str, np.ndarray]]:
    """Role, name and merit [layers, heads] of every baseline."""
    wanted = reading.options.baselines
    if wanted == "none":
        return
    draws = SEEDS if wanted == "all" else 1
    for number in range(draws):
        scores = first_layer_kept(reading.merit.shape, reading.options.seed + number)
        yield "random", "random, first layer kept" + (f" ({draws}x)" if draws > 1 else ""), scores
    # A toolkit may hold scores from another build; what a report shows may not depend on that.
    if wanted == "all" or reads_cache(reading.scores.source):
        free = toolkit.importance[score_key(reading.options)].mean(-1)
        yield "domain-free", "domain-free mask", merit(free, reading.whitelist)
    if wanted == "all":
        for name in CACHED_BASELINES:
            if name != reading.scores.criterion or not reads_cache(reading.scores.source):
                yield (
                    "criterion",
                    f"criterion {name}",
                    merit(head_scores(toolkit, name, reading.used), reading.whitelist),
                )
        for ranking in reading.scores.others:
            yield "criterion", f"criterion {ranking.name}", merit(ranking.values, reading.whitelist)


def most_rivals(
    wanted: Baselines, source: Source, *, sized: bool = False, whole: bool = False, peers: bool = True
) -> int:
    """How many masks `rivals` names at most, before any score is known; `sized`: within bounds on parameters or
    memory; `whole`: where layers, or their attention, go whole; `peers`: where published pruners have scores.
    """
    if whole:
        return {"none": 0, "few": 1, "all": SEEDS}[wanted]
    if sized:
        return {"none": 0, "few": 1, "all": SEEDS + 2 + peers * len(PEERS)}[wanted]
    free = 1 if wanted == "all" or reads_cache(source) else 0
    return {"none": 0, "few": 1 + free, "all": SEEDS + free + len(CACHED_BASELINES) + 1}[wanted]


def baselines_of(asked: Sequence[Rival], costs: Sequence[Reported], seed: int) -> tuple[Baseline, ...]:
    """Rivals with what they cost, those of one name as their mean."""
    named: dict[tuple[Role, str], list[Reported]] = {}
    for rival, cost in zip(asked, costs, strict=True):
        named.setdefault((rival.role, rival.name), []).append(cost)
    return tuple(Baseline(role, name, _average(found, seed)) for (role, name), found in named.items())


def _average(models: Sequence[Reported], seed: int) -> Reported:
    if len(models) == 1:
        return models[0]
    off = [model.off for model in models if model.off is not None]
    return Reported(average([model.own for model in models], seed=seed), average(off, seed=seed) if off else None)
