"""Head scores of a scenario: from texts like its own, or from the domains' cached importance.

The default scores heads on texts, in one pass: on the scenario's own prompts where it brings enough of them, otherwise
on those that a build chooses and repairs with, which pool prompts fill up in the proportion of the mixture. A criterion
that is named is cached per domain, as published: mixed for a sentence, and joined with what few own prompts say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sspcompile.criteria import key_of, of_key
from sspcompile.criteria.block_influence import NAME as INFLUENCE
from sspcompile.criteria.block_influence import OF_ATTENTION, attention_influence, influence_of, state_distances
from sspcompile.criteria.curvature import costs_of, curvature
from sspcompile.criteria.units import CriterionInput, Units
from sspcompile.errors import ScenarioError, ToolkitError
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.dense import DenseModel
from sspcompile.model.text import GRADIENT_TOKENS, Batch, Sentence, batches_of
from sspcompile.prepare.direct import importance_per_prompt
from sspcompile.prepare.toolkit import Toolkit
from sspcompile.prepare.toolkits import toolkit_for
from sspcompile.progress import Progress, Steps, silent, stage_of
from sspcompile.repair.repair import is_linear
from sspcompile.request.options import AUTO, Granularity, Options, Repairing, Whole
from sspcompile.request.prompts import Prompt
from sspcompile.request.request import Request
from sspcompile.request.splits import own_fit_part, thinned
from sspcompile.select.budget import bounded, cuts_channels
from sspcompile.select.mixture import Mixture, head_scores
from sspcompile.select.shrinkage import shrink
from sspcompile.select.texts import Texts
from sspcompile.workspace import Workspace

# Cached beside any other: a score of all prompts together says nothing about its own spread over prompts; this one's
# stands in for it, and finds the whitelist.
CACHED = "fisher"
COMPENSATED = "obs"
# Scores of the pools that the table of all baselines compares with.
CACHED_BASELINES = (CACHED, "subspace")
# So many of the scenario's own prompts that may choose need no pool beside them.
ENOUGH_PROMPTS = 32
# More texts change no ranking that a measurement could tell from the one of these.
CURVATURE_TEXTS = 64
# What a layer loses, the repairs of those behind it mend in part; behind the last nothing does. So a unit of the last
# layer counts e^TILT times as much as one of the first (docs/quality.md).
TILT = 1.0

Source = Literal["domains", "prompts", "both", "texts"]

# What the pass is called that says what goes whole.
INFLUENCES: Mapping[Whole, str] = {"layers": "influence of layers", "attention": "influence of attention"}


@dataclass(frozen=True)
class Ranking:
    """Scores [layers, heads] of the criterion `name`; only their order matters. `channels` [layers, mlps * width]: what
    it says of those of the MLPs, in the same unit, where it says something.
    """

    name: str
    values: np.ndarray
    channels: np.ndarray | None = None


@dataclass(frozen=True)
class HeadScores:
    """`values` [L, H] of `criterion`, in its unit. `prompts` texts were looked at, and had `prompt_weight` (mean over
    heads, in [0, 1]) against the domains' cached scores: the scenario's own, or with the source `texts` pool prompts
    among them. `others`: what the same pass said in other terms. `channels` [L, mlps * width]: what removing a channel
    of an MLP costs by itself, nats per scored position; None where a build may remove none (`cuts_channels`).
    `influence` [L]: where layers, or their attention, go whole, that of each; `values` are then the same for every head
    of a layer. `distances`: where whole layers go, what `state_distances` says of the states between them.
    """

    criterion: str
    values: np.ndarray
    source: Source
    prompts: int
    prompt_weight: float
    others: tuple[Ranking, ...] = ()
    channels: np.ndarray | None = None
    influence: np.ndarray | None = None
    distances: np.ndarray | None = None

    def as_mapping(self) -> dict[str, object]:
        return {"source": self.source, "prompts": self.prompts, "prompt_weight": round(self.prompt_weight, 6)}


def score_key(options: Options) -> str:
    """The name under which the toolkit caches the scores that a build asks for."""
    return key_of(CACHED if options.criterion == AUTO else options.criterion, options.granularity)


def source_of(request: Request) -> Source:
    """Where the head scores of a scenario come from."""
    options = request.options
    asked, own = options.importance_from, own_fit_part(request.scenario.prompts)
    if options.whole is not None:
        return "prompts" if own and (asked == "prompts" or len(own) >= ENOUGH_PROMPTS) else "texts"
    if asked == "domains" or "scenario" in options.without:
        return "domains"
    if own and (asked == "prompts" or len(own) >= ENOUGH_PROMPTS):
        return "prompts"
    # Texts drawn from the pools know the mixture; what a mixture of scores is worth is seen on cached ones.
    if options.criterion == AUTO and "mixing" not in options.without:
        return "texts"
    return "both" if own else "domains"


def cached_keys(request: Request) -> tuple[str, ...]:
    """The scores that the toolkit must hold for this request: none where texts alone score heads. Within bounds no
    baseline comes from the pools.
    """
    options = request.options
    if options.baselines == "all" and options.whole is None and not bounded(options):
        return tuple(dict.fromkeys((*CACHED_BASELINES, score_key(options))))
    return tuple(dict.fromkeys((CACHED, score_key(options)))) if reads_cache(source_of(request)) else ()


def toolkit_of(
    request: Request, dense: DenseModel, loaded: LoadedModel, workspace: Workspace, progress: Progress = silent
) -> Toolkit:
    """The model's toolkit with all that a build of this request reads from it. Raises what `toolkit_for` raises."""
    toolkit, _ = toolkit_for(
        dense, loaded, request.options, workspace, progress, cached_keys(request), scenario=request.scenario
    )
    return toolkit


def reads_cache(source: Source) -> bool:
    """Whether scores of that source are made of the pools' cached ones."""
    return source in ("domains", "both")


def demand_prompts(request: Request) -> None:
    """Raise ScenarioError when scores are to come from prompts and the scenario has none."""
    if request.options.importance_from == "prompts" and not request.scenario.prompts:
        raise ScenarioError(
            f"--importance-from prompts needs prompts, and {request.scenario.name} has none of its own.",
            hint="Give a file of prompts, or --importance-from domains.",
        )


@dataclass(frozen=True)
class Measured:
    """What one forward and one backward pass over texts say: of the heads `obs` and `fisher`, and of the channels as
    `HeadScores.channels`.
    """

    rankings: tuple[Ranking, Ranking]
    channels: np.ndarray | None


def measured(
    loaded: LoadedModel,
    texts: Sequence[Sentence],
    seed: int,
    granularity: Granularity,
    progress: Steps,
    *,
    repair: Repairing = "least-squares",
) -> Measured:
    """At most CURVATURE_TEXTS of the texts are read, evenly spaced. Costs of `obs` and of channels are tilted by depth
    where least squares will `repair` what is cut.
    """
    read = thinned(texts, CURVATURE_TEXTS)
    given = CriterionInput(batches_of(loaded, read, GRADIENT_TOKENS), len(read), None, seed, granularity, progress)
    found, units = curvature(loaded, given), Units.of(loaded.geometry, granularity)
    mended = repair.startswith("least-squares") and is_linear(loaded.geometry)
    tilt = tilted(loaded.geometry.layers) if mended else np.ones((loaded.geometry.layers, 1))
    rankings = (
        Ranking(key_of(COMPENSATED, granularity), tilt * units.spread(costs_of(found, units), axis=1)),
        # As published: neither its heads nor its channels know of repairs.
        Ranking(key_of(CACHED, granularity), units.spread(found.gates.mean(0), axis=1), found.channels),
    )
    # To second order, closing a gate costs half of its Fisher information.
    return Measured(rankings, None if found.channels is None else tilt * found.channels / 2)


def layer_distances(loaded: LoadedModel, texts: Sequence[Sentence], progress: Steps) -> np.ndarray:
    """`state_distances` on as many of the texts as score heads elsewhere."""
    return state_distances(loaded, _scoring_batches(loaded, texts), progress)


def _scoring_batches(loaded: LoadedModel, texts: Sequence[Sentence]) -> Sequence[Batch]:
    return batches_of(loaded, thinned(texts, CURVATURE_TEXTS), GRADIENT_TOKENS)


def _whole_scores(
    whole: Whole, loaded: LoadedModel, written: Sequence[Sentence], source: Source, progress: Progress
) -> HeadScores:
    """The influence of what goes whole on these texts."""
    report, distances = stage_of(progress, INFLUENCES[whole]), None
    if whole == "layers":
        distances = layer_distances(loaded, written, report)
        name, influence = INFLUENCE, influence_of(distances)
    else:
        name, influence = OF_ATTENTION, attention_influence(loaded, _scoring_batches(loaded, written), report)
    values, read = np.repeat(influence[:, None], loaded.geometry.heads, axis=1), min(len(written), CURVATURE_TEXTS)
    return HeadScores(name, values, source, read, 1.0, influence=influence, distances=distances)


def tilted(layers: int, tilt: float = TILT) -> np.ndarray:
    """What the costs of every layer's units count for, [layers, 1], around 1 in the middle of the model."""
    return np.exp(tilt * ((np.arange(layers) + 0.5) / layers - 0.5))[:, None]


def measured_rankings(
    loaded: LoadedModel,
    texts: Sequence[Sentence],
    seed: int,
    granularity: Granularity,
    progress: Steps,
    *,
    repair: Repairing = "least-squares",
) -> tuple[Ranking, Ranking]:
    """`obs` and `fisher` of the heads, see `measured`."""
    return measured(loaded, texts, seed, granularity, progress, repair=repair).rankings


def score_heads(
    request: Request,
    used: Mixture,
    chosen: Sequence[Prompt],
    toolkit: Toolkit,
    loaded: LoadedModel,
    texts: Texts,
    progress: Progress = silent,
    *,
    protected: Sequence[Prompt] = (),
) -> HeadScores:
    """Score the heads for a scenario by the criterion that it asks for.

    `chosen` are the texts of the build that may choose, filled up from the pools. Of the scenario's own only those are
    looked at (`own_fit_part`), and beside them those that are there for `protected` domains. Raises ScenarioError like
    `demand_prompts`, and ToolkitError where the toolkit lacks the scores that the source needs.
    """
    demand_prompts(request)
    options, source, name = request.options, source_of(request), score_key(request.options)
    if reads_cache(source) and name not in toolkit.importance:
        raise ToolkitError(
            f"The toolkit has no {name} importance.", hint=f"Run `sspcompile prepare --criterion {name}`."
        )
    if source == "domains":
        return HeadScores(name, head_scores(toolkit, name, used), source, 0, 0.0)
    prompts = chosen if source == "texts" else own_fit_part(request.scenario.prompts)
    if source == "prompts":
        prompts = (*prompts, *protected)
    written = texts.continued(prompts, stage_of(progress, "continuations"))
    if options.whole is not None:
        return _whole_scores(options.whole, loaded, written, source, progress)
    report = stage_of(progress, "head scores")
    if options.criterion == AUTO and not reads_cache(source):
        found = measured(loaded, written, options.seed, options.granularity, report, repair=options.repair)
        (first, *others), read = found.rankings, min(len(prompts), CURVATURE_TEXTS)
        channels = found.channels if cuts_channels(options, loaded.geometry) else None
        return HeadScores(first.name, first.values, source, read, 1.0, tuple(others), channels)
    values = importance_per_prompt(loaded, toolkit, name, written, used.parts, options.seed, report)
    criterion, _ = of_key(name)
    read = min(len(prompts), criterion.max_prompts or len(prompts))
    if source == "prompts":
        return HeadScores(name, values.mean(0), source, read, 1.0)
    importance = toolkit.importance[name].astype(np.float64)
    spread = toolkit.spread[CACHED if criterion.per == "set" else name].astype(np.float64)
    shrunk = shrink(importance, spread, used.parts, values, prompts=read)
    return HeadScores(name, shrunk.scores, source, read, float(shrunk.weight.mean()))
