"""Head scores of a scenario: from the domains' cached importance, from its own prompts, or from both.

Where the scenario brings enough prompts of its own they score heads alone: the pools say what a scenario is made of,
and nothing that its own prompts do not say better. Where it brings none, or few, the pools' scores stand in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sspcompile.criteria import key_of, of_key
from sspcompile.criteria.curvature import costs_of, curvature
from sspcompile.criteria.units import CriterionInput, Units
from sspcompile.errors import ScenarioError, ToolkitError
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.text import GRADIENT_TOKENS, Sentence, batches_of
from sspcompile.prepare.direct import importance_per_prompt
from sspcompile.prepare.toolkit import Toolkit
from sspcompile.progress import Progress, Steps, silent, stage_of
from sspcompile.request.options import AUTO, Granularity, Options
from sspcompile.request.request import Request
from sspcompile.request.splits import own_fit_part, thinned
from sspcompile.select.mixture import Mixture, head_scores
from sspcompile.select.shrinkage import shrink
from sspcompile.select.texts import Texts

# What the default caches of the pools. A score of all prompts together says nothing about its own spread over prompts:
# this one's stands in for it, and finds the whitelist.
CACHED = "fisher"
COMPENSATED = "obs"
# Scores of the pools that the table of all baselines compares with.
CACHED_BASELINES = (CACHED, "subspace")
# So many of the scenario's own prompts that may choose need no pool beside them.
ENOUGH_PROMPTS = 32
# More texts change no ranking that a measurement could tell from the one of these.
CURVATURE_TEXTS = 64

Source = Literal["domains", "prompts", "both"]


@dataclass(frozen=True)
class Ranking:
    """Scores [layers, heads] of the criterion `name`; only their order matters."""

    name: str
    values: np.ndarray


@dataclass(frozen=True)
class HeadScores:
    """`values` [L, H] in the criterion's unit. `prompts` of the scenario's own were looked at, and had `prompt_weight`
    (mean over heads, in [0, 1]) against the domains' cached scores. `others`: what the same pass said in other terms.
    """

    values: np.ndarray
    source: Source
    prompts: int
    prompt_weight: float
    others: tuple[Ranking, ...] = ()

    def as_mapping(self) -> dict[str, object]:
        return {"source": self.source, "prompts": self.prompts, "prompt_weight": round(self.prompt_weight, 6)}


def score_key(options: Options) -> str:
    """The name under which the toolkit caches the scores that a build asks for."""
    return key_of(CACHED if options.criterion == AUTO else options.criterion, options.granularity)


def source_of(request: Request) -> Source:
    """Where the head scores of a scenario come from."""
    asked, own = request.options.importance_from, own_fit_part(request.scenario.prompts)
    if asked == "domains" or "scenario" in request.options.without or not own:
        return "domains"
    return "prompts" if asked == "prompts" or len(own) >= ENOUGH_PROMPTS else "both"


def cached_keys(request: Request) -> tuple[str, ...]:
    """The scores that the toolkit must hold for this request: none where its own prompts suffice."""
    options = request.options
    if options.baselines == "all":
        return tuple(dict.fromkeys((*CACHED_BASELINES, score_key(options))))
    return () if source_of(request) == "prompts" else tuple(dict.fromkeys((CACHED, score_key(options))))


def demand_prompts(request: Request) -> None:
    """Raise ScenarioError when scores are to come from prompts and the scenario has none."""
    if request.options.importance_from == "prompts" and not request.scenario.prompts:
        raise ScenarioError(
            f"--importance-from prompts needs prompts, and {request.scenario.name} has none of its own.",
            hint="Give a file of prompts, or --importance-from domains.",
        )


def measured_rankings(
    loaded: LoadedModel, texts: Sequence[Sentence], seed: int, granularity: Granularity, progress: Steps
) -> tuple[Ranking, Ranking]:
    """What one forward and one backward pass over texts say of the heads: `fisher`, and `obs`.

    At most CURVATURE_TEXTS of them are read, evenly spaced.
    """
    read = thinned(texts, CURVATURE_TEXTS)
    given = CriterionInput(batches_of(loaded, read, GRADIENT_TOKENS), len(read), None, seed, granularity, progress)
    found, units = curvature(loaded, given), Units.of(loaded.geometry, granularity)
    return (
        Ranking(key_of(CACHED, granularity), units.spread(found.gates.mean(0), axis=1)),
        Ranking(key_of(COMPENSATED, granularity), units.spread(costs_of(found, units), axis=1)),
    )


def score_heads(
    request: Request, used: Mixture, toolkit: Toolkit, loaded: LoadedModel, texts: Texts, progress: Progress = silent
) -> HeadScores:
    """Score the heads for a scenario by the criterion that it asks for.

    Only prompts that may choose are looked at (`own_fit_part`). Raises ScenarioError like `demand_prompts`, and
    ToolkitError where the toolkit lacks the scores that the source needs.
    """
    demand_prompts(request)
    options, source, name = request.options, source_of(request), score_key(request.options)
    if source != "prompts" and name not in toolkit.importance:
        raise ToolkitError(
            f"The toolkit has no {name} importance.", hint=f"Run `sspcompile prepare --criterion {name}`."
        )
    if source == "domains":
        return HeadScores(head_scores(toolkit, name, used), source, 0, 0.0)
    prompts = own_fit_part(request.scenario.prompts)
    written = texts.continued(prompts, stage_of(progress, "continuations (the scenario's prompts)"))
    report = stage_of(progress, "head scores on the scenario's prompts")
    if source == "prompts" and options.criterion == AUTO:
        first, *others = measured_rankings(loaded, written, options.seed, options.granularity, report)
        return HeadScores(first.values, source, min(len(prompts), CURVATURE_TEXTS), 1.0, tuple(others))
    values = importance_per_prompt(loaded, toolkit, name, written, used.parts, options.seed, report)
    criterion, _ = of_key(name)
    read = min(len(prompts), criterion.max_prompts or len(prompts))
    if source == "prompts":
        return HeadScores(values.mean(0), source, read, 1.0)
    importance = toolkit.importance[name].astype(np.float64)
    spread = toolkit.spread[CACHED if criterion.per == "set" else name].astype(np.float64)
    shrunk = shrink(importance, spread, used.parts, values, prompts=read)
    return HeadScores(shrunk.scores, source, read, float(shrunk.weight.mean()))
