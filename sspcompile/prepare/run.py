"""`prepare`: from a model and its domain pools to a Toolkit."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sspcompile.criteria import measuring
from sspcompile.criteria.table import CRITERIA, of_key
from sspcompile.errors import InputError
from sspcompile.model.chat import template_digest
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.text import CONTINUATION_TOKENS, MAX_TOKENS, TEXT_VERSION
from sspcompile.prepare import axes as domain_axes
from sspcompile.prepare import calibration, importance, probes
from sspcompile.prepare.direct import spread_by_domain
from sspcompile.prepare.recognition import Recognition, corpus_of, recognise, selected_axes
from sspcompile.prepare.stages import Stages
from sspcompile.prepare.toolkit import Toolkit, check
from sspcompile.prepare.whitelist import FALSE_DISCOVERY, Whitelist, whitelist
from sspcompile.progress import Progress, silent, stage_of
from sspcompile.request.domains import DomainPool, pools_fingerprint

MIN_PROMPTS = 8  # per domain: with fewer, a held-out part of a quarter holds less than two


def prepare(
    loaded: LoadedModel,
    pools: Sequence[DomainPool],
    outside: Sequence[DomainPool],
    *,
    axes: int | None = None,
    criteria: Sequence[str] = ("fisher",),
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
    continuation_tokens: int = CONTINUATION_TOKENS,
    stages: Stages | None = None,
    progress: Progress = silent,
) -> Toolkit:
    """Learn everything that compiling scenarios for this model needs. The same inputs give the same Toolkit.

    `stages` says where an interrupted run kept what it had measured; without it, nothing is kept.
    `axes` of the `pools` become domains (all of them without it), and the others join `outside`: text of none of the
    domains, for the out-of-domain temperature; without any, that regime stays uncalibrated and `meta` says so. The
    whitelist is found with the first of `criteria` that scores every prompt. Raises InputError for pools that are too
    few, too small or share a name, for unknown criteria, and when none of them scores every prompt.
    """
    _validate(pools, criteria, axes)
    stages = stages or Stages(loaded)
    facts = _given_facts(pools, outside, axes)
    if axes is not None and axes < len(pools):
        pools, rest, selection = selected_axes(stages, pools, axes, max_tokens, progress)
        facts, outside = facts | {"axes": selection}, (*outside, *rest)
    corpus = corpus_of(pools)
    told = recognise(stages, corpus, pools, outside, seed, max_tokens, progress)
    prompts = [corpus.texts[row] for row in corpus.prompt_rows]
    labels = corpus.labels[corpus.prompt_rows]
    texts = stages.continued(prompts, continuation_tokens, max_tokens, stage_of(progress, "continuations"))
    unit = importance.probe_directions(told.fitted.weight, told.fitted.scale)
    scores = {
        key: stages.scored(key, texts, labels, unit, seed, stage_of(progress, key)) for key in dict.fromkeys(criteria)
    }
    tested = next(key for key in scores if of_key(key)[0].per == "prompt")
    confirmed = whitelist(scores[tested].own_axis(), scores[tested].labels)
    settings = {
        "seed": seed,
        "text_version": TEXT_VERSION,
        "chat_template": template_digest(loaded.tokenizer, loaded.rendering),
        "max_tokens": max_tokens,
        "continuation_tokens": continuation_tokens,
        "pools_fingerprint": pools_fingerprint(pools),
        "outside_fingerprint": pools_fingerprint(outside),
        "prompts": {pool.name: len(pool.prompts) for pool in pools},
    }
    learned = {
        "format_confound": probes.format_confound(prompts, labels, seed),
        "importance_prompts": {name: found.prompts for name, found in scores.items()},
        "whitelist": _whitelist_facts(tested, confirmed),
    }
    meta = _versions() | told.facts() | facts | settings | learned
    cached = {key: _cached(found, len(pools)) for key, found in scores.items()}
    toolkit = _toolkit(loaded, pools, told, cached, confirmed, meta)
    check(toolkit)
    return toolkit


def _toolkit(
    loaded: LoadedModel,
    pools: Sequence[DomainPool],
    told: Recognition,
    cached: Mapping[str, tuple[np.ndarray, np.ndarray]],
    confirmed: Whitelist,
    meta: dict[str, Any],
) -> Toolkit:
    fitted = told.fitted
    return Toolkit(
        fingerprint=loaded.fingerprint,
        domains=tuple(pool.name for pool in pools),
        axes=_f32(told.directions),
        gram=_f32(domain_axes.gram(told.directions)),
        feature_mean=_f32(fitted.mean),
        feature_scale=_f32(fitted.scale),
        probe_weight=_f32(fitted.weight),
        probe_bias=_f32(fitted.bias),
        probe_auc=_f32(told.auc),
        layer_weight=_f32(probes.layer_weights(told.auc)),
        log_temperature=_f32(calibration.log_temperatures(told.fits, loaded.geometry.layers)),
        importance={key: mean for key, (mean, _) in cached.items()},
        spread={key: spread for key, (_, spread) in cached.items()},
        whitelist_p=_f32(confirmed.p),
        whitelist=confirmed.chosen,
        meta=meta,
    )


def importance_by_domain(
    stages: Stages, toolkit: Toolkit, pools: Sequence[DomainPool], name: str, progress: Progress = silent
) -> tuple[np.ndarray, np.ndarray]:
    """Importance and spread of one more criterion for an existing toolkit, [L, H, K] each, as `prepare` would have
    measured them; see `with_importance`.

    Raises InputError when `pools` are not those that the toolkit was prepared with.
    """
    if pools_fingerprint(pools) != toolkit.meta["pools_fingerprint"]:
        raise InputError("The domain pools changed since the toolkit was prepared.", hint="Prepare again.")
    corpus = corpus_of(pools)
    texts = stages.continued(
        [corpus.texts[row] for row in corpus.prompt_rows],
        toolkit.meta["continuation_tokens"],
        toolkit.meta["max_tokens"],
        stage_of(progress, "continuations"),
    )
    unit = importance.probe_directions(toolkit.probe_weight, toolkit.feature_scale)
    labels = corpus.labels[corpus.prompt_rows]
    scores = stages.scored(name, texts, labels, unit, toolkit.meta["seed"], stage_of(progress, name))
    return _cached(scores, len(pools))


def _cached(scores: measuring.Scores, domains: int) -> tuple[np.ndarray, np.ndarray]:
    """Importance and spread per domain, [L, H, K] float32 each."""
    return _f32(scores.by_domain(domains)), _f32(spread_by_domain(scores.own_axis(), scores.labels, domains))


def _validate(pools: Sequence[DomainPool], criteria: Sequence[str], axes: int | None) -> None:
    if len(pools) < 2:
        raise InputError(f"{len(pools)} domain pools were given.", hint="At least 2 are needed to tell them apart.")
    if axes is not None and not 2 <= axes <= len(pools):
        raise InputError(f"{axes} of {len(pools)} pools cannot become axes.", hint=f"From 2 to {len(pools)} can.")
    names = [pool.name for pool in pools]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"Domain names appear twice: {', '.join(twice)}.", hint="Give each pool its own name.")
    small = [f"{pool.name} ({len(pool.prompts)})" for pool in pools if len(pool.prompts) < MIN_PROMPTS]
    if small:
        raise InputError(f"Too few prompts: {', '.join(small)}.", hint=f"At least {MIN_PROMPTS} per domain.")
    if not criteria:
        raise InputError("No criterion was given.", hint=f"Accepted: {', '.join(CRITERIA)}.")
    if all(of_key(key)[0].per != "prompt" for key in criteria):
        fit = ", ".join(name for name, entry in CRITERIA.items() if entry.per == "prompt")
        raise InputError(
            f"The whitelist cannot be tested with {', '.join(criteria)}: no score for each prompt.",
            hint=f"Add one of {fit}.",
        )


def _given_facts(pools: Sequence[DomainPool], outside: Sequence[DomainPool], axes: int | None) -> dict[str, Any]:
    """What was asked for, so that a saved toolkit can be told from one of other pools."""
    return {
        "candidates_fingerprint": pools_fingerprint(pools),
        "given_outside_fingerprint": pools_fingerprint(outside),
        "axes_asked": axes,
    }


def _whitelist_facts(criterion: str, confirmed: Whitelist) -> dict[str, Any]:
    return {"criterion": criterion, "false_discovery": FALSE_DISCOVERY, "heads": int(confirmed.chosen.sum())}


def _versions() -> dict[str, Any]:
    import torch
    import transformers

    names = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    return {"versions": {**names, "numpy": np.__version__}}


def _f32(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=np.float32)
