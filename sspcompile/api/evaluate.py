"""`eval`: which questions are asked, and what both models make of them.

No prompt that chose heads, fitted a repair or decided between them is ever asked: those shares of the scenario's own
prompts and of every domain pool (`request.splits`) are left out with all of their conversations, and dropped from the
user's data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from sspcompile.api.arguments import CutModel, Named
from sspcompile.checkpoint import Checkpoint, embedded_model, fingerprint
from sspcompile.checkpoint.manifest import read_manifest
from sspcompile.embedded.questions import questions as known_questions
from sspcompile.errors import InputError
from sspcompile.evaluate.asking import Limits, compare, limits_for
from sspcompile.evaluate.questions import Conversation, Question, read_data, single
from sspcompile.evaluate.results import SuiteResult, suite_result
from sspcompile.model.decoder import LoadedModel
from sspcompile.prepare.toolkits import toolkit_for
from sspcompile.progress import Progress, silent, within
from sspcompile.request.conversations import Opening, is_of, openings
from sspcompile.request.domains import DomainPool
from sspcompile.request.pools import pools_of, shipped_pools
from sspcompile.request.prompts import Passage, Prompt, answer_of, asked_of, bare
from sspcompile.request.request import built_request, read_request
from sspcompile.request.scenario import Scenario
from sspcompile.request.splits import Holding, seen, split, thinned, whole_shares
from sspcompile.select.reading import mixture_through
from sspcompile.slicing.mask import load_mask
from sspcompile.workspace import MASK, RECIPE, Workspace

SUITE_ITEMS = 100
# Words of an answer that is either right or wrong.
SHORT_ANSWER = 6


@dataclass(frozen=True)
class Suite:
    """Questions that are reported together. `dropped` of them were left out because the artifact was fitted on them."""

    name: str
    conversations: tuple[Conversation, ...]
    dropped: int = 0

    @property
    def owners(self) -> np.ndarray:
        """Which of them are one, though they are asked one by one: lines of a log with the conversation so far, int64
        [conversations].
        """
        first = [one.turns[0].prompt for one in self.conversations]
        found = openings(first)
        number = {one: index for index, one in enumerate(dict.fromkeys(found.values()))}
        return np.array([number[found[bare(prompt)]] for prompt in first])


@dataclass(frozen=True)
class Deployment:
    """What a scenario is made of: domain -> weight (the unknown share spread evenly), its own prompts, those of their
    conversations which may have been fitted on, and the pools that it was built with."""

    weights: Mapping[str, float]
    prompts: tuple[Prompt, ...]
    fitted: frozenset[Opening]
    pools: tuple[DomainPool, ...]


def deployment_of(
    model: CutModel,
    scenario: str | Scenario | None,
    loaded: LoadedModel,
    workspace: Workspace,
    seed: int,
    progress: Progress,
) -> Deployment | None:
    """The build's own scenario, or the one that was asked for; None when neither is known."""
    own = _built_for(model.build) if model.build is not None else None
    if scenario is None:
        return own
    rendering = {"chat_template": model.rendering.template, "raw": model.rendering.raw or None}
    request = read_request(scenario, {"model": model.dense.place, "seed": seed, **rendering}, {})
    toolkit, _ = toolkit_for(model.dense, loaded, request.options, workspace, progress, (), scenario=request.scenario)
    mixture = mixture_through(request, toolkit, loaded)
    shares = dict(zip(mixture.domains, map(float, mixture.weights), strict=True))
    prompts = request.scenario.prompts
    return Deployment(
        weights=_spread(shares, mixture.unknown),
        prompts=prompts,
        fitted=own.fitted if own is not None else _maybe_seen(prompts, _origin(model.found)),
        pools=own.pools if own is not None else pools_of(request.options).every,
    )


def _origin(found: Named) -> Mapping[str, Any]:
    """What is recorded of a cut or an export; nothing of an ordinary model."""
    return {} if found.kind == "model" else read_manifest(found.folder).origin


def _maybe_seen(prompts: Sequence[Prompt], origin: Mapping[str, Any]) -> frozenset[Opening]:
    """What may have been fitted on where there is no build's own record: it may have been built for this very scenario.
    Origins say how prompts were held out; those of earlier versions, and of masks that no build made, do not.
    """
    ways = [Holding.of(origin)] if "holding" in origin else [*Holding]
    return frozenset(chain(*(seen(prompts, way) for way in ways)))


def _built_for(folder: Path) -> Deployment:
    """What a build was made for, from its own recipe and mask."""
    request = built_request(folder / RECIPE)
    given, prompts = pools_of(request.options), request.scenario.prompts
    stated = load_mask(folder / MASK).scenario
    return Deployment(
        weights=_spread(stated["mixture"], stated["unknown"]),
        prompts=prompts,
        fitted=seen(prompts, Holding.of(read_manifest(folder).origin)),
        pools=given.every,
    )


def _spread(weights: Mapping[str, float], unknown: float) -> dict[str, float]:
    return {name: (1 - unknown) * weight + unknown / len(weights) for name, weight in weights.items()}


def fitted_prompts(deployment: Deployment | None, place: str) -> frozenset[Opening]:
    """Every conversation that may have chosen or repaired anything: prompts of the pools and the scenario's own.

    Without a deployment the pools are those that ship for the model at `place`.

    Text of no domain calibrates, all of it; it is in no suite.
    """
    ready = shipped_pools(place)
    pools = deployment.pools if deployment else ready.every
    weights = deployment.weights if deployment else {pool.name: 1.0 for pool in ready.candidates}
    learned = [seen(one.prompts) if one.name in weights else openings(one.prompts).values() for one in pools]
    return frozenset(chain(*learned, deployment.fitted if deployment else ()))


def scenario_suites(
    deployment: Deployment, fitted: frozenset[Opening], *, labelled: bool, count: int, seed: int
) -> list[Suite]:
    """`scenario`: own prompts that were held out and questions of its domains, in proportion to their weights;
    `off_domain`: questions of the other domains, as many of each. Both have about `count` prompts.

    A domain is the scenario's own when its weight is at least that of an even mixture. `labelled` draws the
    checkable questions of the embedded model instead of held-out pool prompts.
    """
    names = list(deployment.weights)
    own = [name for name in names if deployment.weights[name] >= 1 / len(names) - 1e-6]
    other = [name for name in names if name not in own]
    asked = [prompt for prompt in dict.fromkeys(deployment.prompts) if not isinstance(prompt, Passage)]
    held = thinned([prompt for prompt in asked if not is_of(prompt, fitted)], count)
    share = [deployment.weights[name] for name in own]
    questions = [Question(asked_of(prompt), short_answers(prompt)) for prompt in held]
    pools = {pool.name: pool for pool in deployment.pools}
    questions += _questions(own, share, count - len(held), pools, labelled, fitted, seed)
    suites = [Suite("scenario", single(questions))]
    if other:
        drawn = _questions(other, [1.0] * len(other), count, pools, labelled, fitted, seed)
        suites.append(Suite("off_domain", single(drawn)))
    return [suite for suite in suites if suite.conversations]


def _questions(
    domains: Sequence[str],
    weights: Sequence[float],
    count: int,
    pools: Mapping[str, DomainPool],
    labelled: bool,
    fitted: frozenset[Opening],
    seed: int,
) -> list[Question]:
    rng = np.random.default_rng(seed)
    found = []
    for domain, share in zip(domains, whole_shares(np.array(weights), count), strict=True):
        if labelled and known_questions(domain):
            known = [one for one in known_questions(domain) if not is_of(one.prompt, fitted)]
            # Neighbours, so that every kind of task is asked; the next seed's stand behind them, round and round.
            drawn = (known[(seed * share + n) % len(known)] for n in range(min(share, len(known))))
            found += [Question(one.prompt, (one.answer,), None, domain) for one in drawn]
        else:
            texts = [text for text in split(pools[domain].prompts)[2] if not is_of(text, fitted)]
            found += [Question(texts[n], domain=domain) for n in np.sort(rng.permutation(len(texts))[:share])]
    return found


def short_answers(prompt: Prompt) -> tuple[str, ...]:
    """The reference answer where it is short enough to be given word by word; longer ones are told in many ways."""
    answer = answer_of(prompt)
    return (answer,) if answer is not None and len(answer.split()) <= SHORT_ANSWER else ()


def data_suite(path: Path, fitted: frozenset[Opening], *, count: int | None, seed: int) -> Suite:
    """A file or folder of the user's. Raises InputError when it is malformed, or nothing of it may be asked."""
    read = read_data(path)
    kept = [c for c in read if not any(is_of(turn.prompt, fitted) for turn in c.turns)]
    if not kept:
        raise InputError(f"Every prompt of {path} was fitted on.", hint="Evaluate on other prompts.")
    dropped = sum(len(c.turns) for c in read) - sum(len(c.turns) for c in kept)
    if count is not None and count < len(kept):
        kept = [kept[n] for n in np.sort(np.random.default_rng(seed).permutation(len(kept))[:count])]
    return Suite(str(path), tuple(kept), dropped)


def evaluate(
    model: CutModel,
    workspace: Workspace,
    progress: Progress = silent,
    *,
    scenario: str | Scenario | None = None,
    data: Sequence[Path] = (),
    items: int | None = None,
    limits: Limits | None = None,
    seed: int = 0,
) -> list[SuiteResult]:
    """Ask both models all suites, within `limits` (by default the usual ones) and the positions that both have.

    Raises InputError when there is nothing to ask, and whatever reading raises.
    """
    for path in data:  # malformed files are refused before anything heavy starts
        read_data(path)
    if model.build is None and scenario is None and not data:
        raise InputError(f"{model.name} does not say which scenario it is for.", hint="Give --scenario or --data.")
    limits = limits_for(model.positions) if limits is None else limits.within(model.positions)
    dense, sliced = model.load()
    deployment = deployment_of(model, scenario, dense, workspace, seed, progress)
    fitted = fitted_prompts(deployment, model.dense.place)
    labelled = model.dense.fingerprint == fingerprint(Checkpoint(embedded_model()))
    count = SUITE_ITEMS if items is None else items
    suites = []
    if deployment is not None:
        suites += scenario_suites(deployment, fitted, labelled=labelled, count=count, seed=seed)
    suites += [data_suite(path, fitted, count=items, seed=seed) for path in data]
    results = []
    for suite in suites:
        asked = compare(dense, sliced, suite.conversations, limits, within(progress, suite.name))
        first, second = (replace(one, owner=suite.owners[one.owner]) for one in asked)
        results.append(suite_result(suite.name, first, second, dropped=suite.dropped, seed=seed))
    return results
