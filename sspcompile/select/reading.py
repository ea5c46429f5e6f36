"""A scenario read through a toolkit: what it is made of, and what every head is worth to it.

One forward pass over the scenario's text, then arithmetic. Nothing is measured against the dense model yet; the masks
that follow from the scores alone are what `plan` shows, and what `select` starts from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from sspcompile.checkpoint.source import Checkpoint
from sspcompile.errors import UnsupportedModelError
from sspcompile.families import Geometry
from sspcompile.model.capture import features
from sspcompile.model.decoder import LoadedModel
from sspcompile.prepare.recognition import recognised_tokens
from sspcompile.prepare.toolkit import Toolkit
from sspcompile.progress import Progress, silent, stage_of
from sspcompile.request.options import WHOLE_LAYOUTS, Options
from sspcompile.request.pools import pools_of
from sspcompile.request.prompts import pasted
from sspcompile.request.protecting import protected_pools
from sspcompile.request.request import Request
from sspcompile.request.splits import PROTECTED_SHARE, Splits, draw_splits, thinned
from sspcompile.select.budget import Budget, bounded, bounds_of, budget_of, merit
from sspcompile.select.mixture import Mixture, ablated, given_mixture, mixture_of, protecting
from sspcompile.select.scoring import HeadScores, Ranking, reads_cache, score_heads
from sspcompile.select.texts import Texts
from sspcompile.slicing.depth import least_influence
from sspcompile.slicing.latency import LatencyTable
from sspcompile.slicing.layouts import Choice, choose
from sspcompile.slicing.mask import Layout
from sspcompile.slicing.plan import host_of
from sspcompile.slicing.sizes import Worth, choose_per_layer, uniform_sizes

# Channels are scored as if each went by itself, heads after the best change of what stays; many channels mend each
# other, so their sum counts for less.
RATE = 0.25
# So many of a scenario's texts say what it is made of.
MIXTURE_TEXTS = 64


@dataclass(frozen=True)
class Reading:
    """What a scenario is made of and what every head is worth to it.

    `mixture` is what was measured; `used` is what scored the heads, and differs only where a part of the method is
    switched off (`without`) or a domain is protected. `splits` are the texts of the build, drawn from the scenario and,
    in the proportion of the mixture, from the pools. `merit` is [layers, heads], `whitelist` bool [layers, heads]. The
    `budget` allows everything until it is measured, where the options bound the loss alone.
    """

    request: Request
    mixture: Mixture
    used: Mixture
    splits: Splits
    scores: HeadScores
    whitelist: np.ndarray
    merit: np.ndarray
    budget: Budget

    @property
    def options(self) -> Options:
        return self.request.options

    @property
    def groups_only(self) -> bool:
        """Whether whole key/value groups are cut, never single heads."""
        return self.options.granularity == "group"

    def worth(self, rate: float = RATE) -> Worth:
        """What heads and channels cost in one measure, channels counted `rate` times."""
        channels = self.scores.channels
        return Worth(self.merit, None if channels is None else rate * channels)

    @property
    def ranking(self) -> Ranking:
        """What the heads are chosen by, unless a build measures more."""
        return Ranking(self.scores.criterion, self.scores.values)


def read_through(
    request: Request,
    toolkit: Toolkit,
    loaded: LoadedModel,
    texts: Texts,
    progress: Progress = silent,
    *,
    build: bool,
    table: LatencyTable | None = None,
) -> Reading:
    """Read a scenario through the toolkit; `table` is what a bound on time counts by. Raises what `score_heads`,
    `protected_pools` and `bounds_of` raise.

    Where texts score heads (`source_of`), the passes of the criterion come on top. For a `build` every text of it is
    continued here, those that decide and judge too.
    """
    options = request.options
    mixture = mixture_through(request, toolkit, loaded)
    pools = pools_of(options).named(mixture.domains)
    protect = protected_pools(options, mixture.parts, pools)
    splits = draw_splits(request.scenario.prompts, mixture.parts, pools, options.seed, protect)
    if build:  # all at once: a step of decoding reads the weights once for a whole batch
        texts.continued(splits.every, stage_of(progress, "continuations"))
    named = {name: [pool.name for pool in found] for name, found in protect.items()}
    used = protecting(ablated(mixture, options.without), named, PROTECTED_SHARE)
    scores = score_heads(request, used, splits.fit, toolkit, loaded, texts, progress, protected=splits.of_protected)
    # Privilege comes with the pools' scores; a toolkit may hold it from another build that read them.
    bounds = bounds_of(options, Checkpoint(loaded.path), table) if bounded(options) else ()
    whitelist = toolkit.whitelist & ("whitelist" not in options.without) & reads_cache(scores.source)
    return Reading(
        request=request,
        mixture=mixture,
        used=used,
        splits=splits,
        scores=scores,
        whitelist=whitelist,
        merit=merit(scores.values, whitelist),
        budget=budget_of(options, loaded.geometry, bounds, mixture.breadth),
    )


def mixture_through(request: Request, toolkit: Toolkit, loaded: LoadedModel) -> Mixture:
    """What a scenario is made of; of many prompts MIXTURE_TEXTS are read, evenly spaced."""
    scenario, options = request.scenario, request.options
    if scenario.domains is not None:
        return given_mixture(toolkit, scenario.domains, source=scenario.name)
    read = tuple(map(pasted, thinned(scenario.texts, MIXTURE_TEXTS)))
    layers = toolkit.learned.layers.tolist()
    found = features(loaded, read, recognised_tokens(options.max_tokens), layers=layers, bare=True)
    return mixture_of(toolkit, found, calibrated="calibration" not in options.without)


def choices_for(reading: Reading, geometry: Geometry) -> Mapping[Layout, Choice]:
    """One choice per layout that is asked for. `auto` asks for both and leaves out one that no class can hold.

    A host is wished for uniform cuts only, so with it `auto` asks for that one. Raises BudgetError,
    UnsupportedModelError when nothing is left, and InputError for a host that cannot hold the choice.
    """
    options = reading.options
    asked: tuple[Layout, ...]
    if options.whole is not None:
        asked = (WHOLE_LAYOUTS[options.whole],)
    elif options.layout != "auto":
        asked = (options.layout,)
    else:
        asked = ("uniform", "per-layer") if options.wanted_host is None else ("uniform",)
    found: dict[Layout, Choice] = {}
    for name in asked:
        try:
            found[name] = next(iter(held(reading, geometry, name)))
        except UnsupportedModelError:
            if name == asked[-1] and not found:
                raise
    return found


def held(reading: Reading, geometry: Geometry, layout: Layout) -> Iterator[Choice]:
    """The choices of a layout that a class can hold, the first one first; raises for the last where none can."""
    choices = within(reading, geometry, layout)
    found = False
    for choice in choices:
        try:
            host_of(geometry, choice.shapes, reading.options.wanted_host, layout=layout, widths=choice.widths)
        except UnsupportedModelError:
            if choice is choices[-1] and not found:
                raise
            continue
        found = True
        yield choice


def within(reading: Reading, geometry: Geometry, layout: Layout, worth: Worth | None = None) -> tuple[Choice, ...]:
    """The masks of a layout within the reading's budget, by its own worth of units or by another, or by the influence
    of what goes whole; raises BudgetError when there is none.
    """
    budget, groups_only = reading.budget, reading.groups_only
    if reading.scores.influence is not None:
        whole = reading.options.whole or "layers"
        return (least_influence(reading.scores.influence, geometry, budget.bounds, whole),)
    worth = worth or reading.worth()
    if not budget.bounds:
        return (choose(worth.heads, geometry.kv_heads, budget.keep, layout, groups_only=groups_only),)
    if layout == "uniform":
        return uniform_sizes(worth, geometry, budget.bounds, groups_only=groups_only)
    return (choose_per_layer(worth, geometry, budget.bounds, groups_only=groups_only),)
