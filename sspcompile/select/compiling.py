"""The stages in order, each a value: Scenario -> Toolkit -> HeadMask -> SlicePlan -> files -> proof -> report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sspcompile import prepare as preparing
from sspcompile.criteria import key_of
from sspcompile.errors import ToolkitError, UnsupportedModelError
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.dense import DenseModel
from sspcompile.prepare.toolkit import Toolkit
from sspcompile.progress import Progress, silent
from sspcompile.request.pools import pools_of
from sspcompile.request.recipe import AUTO, Recipe
from sspcompile.request.scenario import Scenario
from sspcompile.request.splits import Evidence, gather
from sspcompile.select.budget import keep_from_strength, merit
from sspcompile.select.mixture import Mixture, ablated, given_mixture, mixture_of
from sspcompile.select.scoring import HeadScores, score_heads
from sspcompile.slicing.layouts import Choice, choose
from sspcompile.slicing.mask import HeadMask, Layout, kept_of
from sspcompile.slicing.plan import host_of

# What ranks heads where nobody says otherwise: the best at every budget per-layer among those that cost a few passes.
AUTO_CRITERION = "fisher-rounds"


@dataclass(frozen=True)
class Ranking:
    """Scores [layers, heads] of the criterion `name`; only their order matters."""

    name: str
    values: np.ndarray


@dataclass(frozen=True)
class Compiled:
    """A scenario read through a toolkit: what it is made of and what every head is worth to it.

    `mixture` is what was measured; `used` is what scored the heads, and differs only where a part of the method is
    switched off (`without`). `merit` is [layers, heads], `whitelist` bool [layers, heads]. `repair` was asked for.
    """

    scenario: Scenario
    mixture: Mixture
    used: Mixture
    scores: HeadScores
    whitelist: np.ndarray
    merit: np.ndarray
    keep: float
    criterion: str
    groups_only: bool
    without: tuple[str, ...]
    repair: str


def score_key(options: Recipe) -> str:
    """The name under which the toolkit caches the scores that a build asks for."""
    name = AUTO_CRITERION if options.criterion in (None, AUTO) else options.criterion
    return key_of(name, options.granularity or "head")


def compile_scenario(
    scenario: Scenario, options: Recipe, toolkit: Toolkit, loaded: LoadedModel, progress: Progress = silent
) -> Compiled:
    """Read a scenario through the toolkit: one forward pass over its text, then arithmetic.

    Where the scenario's own prompts score heads too (`importance_from`), the passes of the criterion come on top.
    """
    name = score_key(options)
    if name not in toolkit.importance:
        raise ToolkitError(
            f"The toolkit has no {name} importance.", hint=f"Run `sspcompile prepare --criterion {name}`."
        )
    without = options.without or ()
    mixture = _mixture(scenario, options, toolkit, loaded)
    used = ablated(mixture, without)
    scores = score_heads(scenario, used, options, toolkit, loaded, name, progress)
    whitelist = toolkit.whitelist & ("whitelist" not in without)
    keep = options.keep if options.keep is not None else keep_from_strength(options.strength or 0.0, mixture.breadth)
    return Compiled(
        scenario=scenario,
        mixture=mixture,
        used=used,
        scores=scores,
        whitelist=whitelist,
        merit=merit(scores.values, whitelist),
        keep=keep,
        criterion=name,
        groups_only=options.granularity == "group",
        without=without,
        repair=options.repair or "none",
    )


def _mixture(scenario: Scenario, options: Recipe, toolkit: Toolkit, loaded: LoadedModel) -> Mixture:
    if scenario.domains is not None:
        return given_mixture(toolkit, scenario.domains, source=scenario.name)
    texts = scenario.prompts or (scenario.text or "",)
    found = preparing.features(loaded, texts, options.max_tokens or 0)
    return mixture_of(toolkit, found, calibrated="calibration" not in (options.without or ()))


def mask_of(
    compiled: Compiled, subject: DenseModel, choice: Choice, layout: Layout, ranking: Ranking | None = None
) -> HeadMask:
    """The mask as a value that can be saved; whitelisted heads are those which the choice kept.

    `ranking` is what the heads were chosen by, where it was not the scenario's own.
    """
    chosen_by = ranking or Ranking(compiled.criterion, compiled.scores.values)
    g = subject.checkpoint.geometry
    kept = np.argwhere(compiled.whitelist & choice.kept)
    return HeadMask(
        model=subject.fingerprint,
        layers=g.layers,
        heads=g.heads,
        kv_heads=g.kv_heads,
        kept=kept_of(choice.kept),
        layout=layout,
        keep_requested=compiled.keep,
        keep_achieved=choice.ratio,
        scores=tuple(tuple(float(f"{score:.6g}") for score in row) for row in chosen_by.values),
        whitelist=tuple((int(layer), int(head)) for layer, head in kept),
        criterion=chosen_by.name,
        scenario={
            "name": compiled.scenario.name,
            "source": compiled.scenario.source,
            **compiled.mixture.as_mapping(),
            "importance": compiled.scores.as_mapping(),
            "without": list(compiled.without),
            "repair": compiled.repair,
        },
    )


def choices_for(
    compiled: Compiled, subject: DenseModel, layout: str, *, host: str | None = None
) -> Mapping[Layout, Choice]:
    """One choice per layout that is asked for. `auto` asks for both and leaves out one that no class can hold.

    A `host` is wished for uniform cuts only, so with it `auto` asks for that one. Raises BudgetError,
    UnsupportedModelError when nothing is left, and InputError for a host that cannot hold the choice.
    """
    g = subject.checkpoint.geometry
    asked: tuple[Layout, ...] = (layout,)  # type: ignore[assignment]
    if layout == "auto":
        asked = ("uniform", "per-layer") if host is None else ("uniform",)
    found: dict[Layout, Choice] = {}
    for name in asked:
        choice = choose(compiled.merit, g.kv_heads, compiled.keep, name, groups_only=compiled.groups_only)
        try:
            host_of(g, choice.shapes, host, layout=name)
        except UnsupportedModelError:
            if name == asked[-1] and not found:
                raise
            continue
        found[name] = choice
    return found


def evidence_for(compiled: Compiled, options: Recipe) -> Evidence:
    """The texts of this build, drawn from the scenario and the pools."""
    pools = pools_of(options).named(compiled.mixture.domains)
    return gather(compiled.scenario.prompts, compiled.mixture.parts, pools, options.seed or 0)
