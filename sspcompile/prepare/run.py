"""`prepare`: from a model and its domain pools to a Toolkit."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sspcompile.criteria.table import of_key
from sspcompile.errors import InputError
from sspcompile.model.chat import template_digest
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.text import CONTINUATION_TOKENS, MAX_TOKENS, TEXT_VERSION
from sspcompile.prepare import axes as domain_axes
from sspcompile.prepare import probes
from sspcompile.prepare.direct import spread_by_domain
from sspcompile.prepare.directions import probe_directions
from sspcompile.prepare.recogniser import Recogniser
from sspcompile.prepare.recognition import Recognition, corpus_of, recognise, selected_axes
from sspcompile.prepare.stages import Stages
from sspcompile.prepare.toolkit import Toolkit, check, with_importance
from sspcompile.prepare.whitelist import FALSE_DISCOVERY, whitelist
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
    domains. Without any, nothing is called unknown, and `meta` says so. Without `criteria` the toolkit tells domains
    apart and scores no head (`with_scores` does). Raises InputError for pools that
    are too few, too small or share a name, and for unknown criteria.
    """
    _validate(pools, axes)
    for key in criteria:
        of_key(key)
    stages = stages or Stages(loaded)
    facts = _given_facts(pools, outside, axes)
    if axes is not None and axes < len(pools):
        pools, rest, selection = selected_axes(stages, pools, axes, max_tokens, progress)
        facts, outside = facts | {"axes": selection}, (*outside, *rest)
    told = recognise(stages, pools, outside, seed, max_tokens, progress)
    corpus = corpus_of(pools)
    prompts = [corpus.texts[row] for row in corpus.prompt_rows]
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
        "format_confound": probes.format_confound(prompts, corpus.labels[corpus.prompt_rows], seed),
        "importance_prompts": {},
        "whitelist": None,
        "probes": None,
    }
    toolkit = _toolkit(loaded, pools, told, _versions() | told.facts | facts | settings | learned)
    check(toolkit)
    for name in dict.fromkeys(criteria):
        toolkit = with_scores(stages, toolkit, pools, name, progress)
    return toolkit


def unlearned(loaded: LoadedModel, pools: Sequence[DomainPool]) -> Toolkit:
    """A toolkit for a scenario that says itself what it is about: it names the domains, and no text was read for it."""
    count, heads = len(pools), (loaded.geometry.layers, loaded.geometry.heads)
    return Toolkit(
        fingerprint=loaded.fingerprint,
        domains=tuple(pool.name for pool in pools),
        axes=np.zeros((count, loaded.geometry.hidden), dtype=np.float32),
        gram=np.eye(count, dtype=np.float32),
        recogniser=None,
        directions=None,
        importance={},
        spread={},
        whitelist_p=np.ones(heads, dtype=np.float32),
        whitelist=np.zeros(heads, dtype=bool),
        meta=_versions(),
    )


def with_scores(
    stages: Stages, toolkit: Toolkit, pools: Sequence[DomainPool], name: str, progress: Progress = silent
) -> Toolkit:
    """The toolkit with one more criterion; the first one that scores every prompt finds the whitelist too.

    Raises InputError for an unknown criterion, and when `pools` are not those that the toolkit was prepared with.
    """
    criterion, _ = of_key(name)
    if pools_fingerprint(pools) != toolkit.meta["pools_fingerprint"]:
        raise InputError("The domain pools changed since the toolkit was prepared.", hint="Prepare again.")
    if criterion.per_axis:
        toolkit = with_directions(stages, toolkit, pools, progress)
    corpus, report = corpus_of(pools), stage_of(progress, "continuations")
    prompts = [corpus.texts[row] for row in corpus.prompt_rows]
    texts = stages.continued(prompts, toolkit.meta["continuation_tokens"], toolkit.meta["max_tokens"], report)
    labels, seed = corpus.labels[corpus.prompt_rows], toolkit.meta["seed"]
    unit = toolkit.directions if criterion.per_axis else None
    scores = stages.scored(name, texts, labels, unit, seed, stage_of(progress, name))
    mean = _f32(scores.by_domain(len(pools)))
    spread = _f32(spread_by_domain(scores.own_axis(), scores.labels, len(pools)))
    counts = toolkit.meta["importance_prompts"] | {name: scores.prompts}
    added = with_importance(replace(toolkit, meta={**toolkit.meta, "importance_prompts": counts}), name, mean, spread)
    if toolkit.meta["whitelist"] is not None or criterion.per != "prompt":
        return added
    confirmed = whitelist(scores.own_axis(), scores.labels)
    facts = {"criterion": name, "false_discovery": FALSE_DISCOVERY, "heads": int(confirmed.chosen.sum())}
    return replace(
        added, whitelist_p=_f32(confirmed.p), whitelist=confirmed.chosen, meta={**added.meta, "whitelist": facts}
    )


def with_directions(
    stages: Stages, toolkit: Toolkit, pools: Sequence[DomainPool], progress: Progress = silent
) -> Toolkit:
    """The toolkit with the probe directions that some criteria read, learned from its `pools` unless they are there."""
    if toolkit.directions is not None:
        return toolkit
    meta = toolkit.meta
    found, facts = probe_directions(stages, pools, meta["seed"], meta["max_tokens"], progress)
    return replace(toolkit, directions=_f32(found), meta={**meta, "probes": facts})


def _toolkit(loaded: LoadedModel, pools: Sequence[DomainPool], told: Recognition, meta: dict[str, Any]) -> Toolkit:
    """What tells domains apart; no head is scored yet, and none is on the whitelist."""
    heads = (loaded.geometry.layers, loaded.geometry.heads)
    recogniser = {name: _f32(array) for name, array in vars(told.recogniser).items()}
    return Toolkit(
        fingerprint=loaded.fingerprint,
        domains=tuple(pool.name for pool in pools),
        axes=_f32(told.axes),
        gram=_f32(domain_axes.gram(told.axes)),
        recogniser=Recogniser(**{**recogniser, "layers": told.recogniser.layers}),
        directions=None,
        importance={},
        spread={},
        whitelist_p=np.ones(heads, dtype=np.float32),
        whitelist=np.zeros(heads, dtype=bool),
        meta=meta,
    )


def _validate(pools: Sequence[DomainPool], axes: int | None) -> None:
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


def _given_facts(pools: Sequence[DomainPool], outside: Sequence[DomainPool], axes: int | None) -> dict[str, Any]:
    """What was asked for, so that a saved toolkit can be told from one of other pools."""
    return {
        "candidates_fingerprint": pools_fingerprint(pools),
        "given_outside_fingerprint": pools_fingerprint(outside),
        "axes_asked": axes,
    }


def _versions() -> dict[str, Any]:
    import torch
    import transformers

    names = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    return {"versions": {**names, "numpy": np.__version__}}


def _f32(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=np.float32)
