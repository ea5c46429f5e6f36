"""`prepare`: from a model and its domain pools to a Toolkit."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from sspcompile.prepare.stages import Stages
from sspcompile.prepare.toolkit import Toolkit, check
from sspcompile.prepare.whitelist import FALSE_DISCOVERY, Whitelist, whitelist
from sspcompile.progress import Progress, silent, stage_of
from sspcompile.request.domains import DomainPool, pools_fingerprint

MIN_PROMPTS = 8  # per domain: with fewer, a held-out part of a quarter holds less than two
CROSS_PER_PAIR = 6
NEAR_CHANCE = 0.6  # mean AUC of a layer below this is reported


@dataclass(frozen=True)
class _Corpus:
    """All pool text in one list: prompts and descriptions of domain 0, then of domain 1, and so on."""

    texts: tuple[str, ...]
    labels: np.ndarray  # [N]
    is_description: np.ndarray  # [N] bool

    @property
    def prompt_rows(self) -> np.ndarray:
        return np.flatnonzero(~self.is_description)


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
    report, stages = progress, stages or Stages(loaded)
    facts = _given_facts(pools, outside, axes)
    if axes is not None and axes < len(pools):
        pools, rest, selection = _selected(stages, pools, axes, max_tokens, report)
        facts, outside = facts | {"axes": selection}, (*outside, *rest)
    corpus = _corpus(pools)
    told = _recognition(stages, corpus, pools, outside, seed, max_tokens, report)
    prompts = [corpus.texts[row] for row in corpus.prompt_rows]
    labels = corpus.labels[corpus.prompt_rows]
    report("continuations", 0, 1)
    texts = stages.continued(prompts, continuation_tokens, max_tokens, stage_of(report, "continuations"))
    report("continuations", 1, 1)
    unit = importance.probe_directions(told.fitted.weight, told.fitted.scale)
    scores = {
        key: stages.scored(key, texts, labels, unit, seed, stage_of(report, key)) for key in dict.fromkeys(criteria)
    }
    tested = next(key for key in scores if of_key(key)[0].per == "prompt")
    confirmed = whitelist(scores[tested].own_axis(), scores[tested].labels)
    meta = (
        _versions()
        | told.facts()
        | facts
        | {
            "seed": seed,
            "text_version": TEXT_VERSION,
            "chat_template": template_digest(loaded.tokenizer, loaded.rendering),
            "max_tokens": max_tokens,
            "continuation_tokens": continuation_tokens,
            "pools_fingerprint": pools_fingerprint(pools),
            "outside_fingerprint": pools_fingerprint(outside),
            "prompts": {pool.name: len(pool.prompts) for pool in pools},
            "format_confound": probes.format_confound(prompts, labels, seed),
            "importance_prompts": {name: found.prompts for name, found in scores.items()},
            "whitelist": _whitelist_facts(tested, confirmed),
        }
    )
    cached = {key: _cached(found, len(pools)) for key, found in scores.items()}
    toolkit = _toolkit(loaded, pools, told, cached, confirmed, meta)
    check(toolkit)
    return toolkit


def _toolkit(
    loaded: LoadedModel,
    pools: Sequence[DomainPool],
    told: _Recognition,
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
    corpus = _corpus(pools)
    report = progress
    texts = stages.continued(
        [corpus.texts[row] for row in corpus.prompt_rows],
        toolkit.meta["continuation_tokens"],
        toolkit.meta["max_tokens"],
        stage_of(report, "continuations"),
    )
    unit = importance.probe_directions(toolkit.probe_weight, toolkit.feature_scale)
    labels = corpus.labels[corpus.prompt_rows]
    scores = stages.scored(name, texts, labels, unit, toolkit.meta["seed"], stage_of(report, name))
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


def _corpus(pools: Sequence[DomainPool]) -> _Corpus:
    texts: list[str] = []
    labels: list[int] = []
    described: list[bool] = []
    for k, pool in enumerate(pools):
        sentences = (pool.description, *(d for d in pool.descriptions if d != pool.description))
        sentences = tuple(text for text in sentences if text.strip())
        texts += [*pool.prompts, *sentences]
        labels += [k] * (len(pool.prompts) + len(sentences))
        described += [False] * len(pool.prompts) + [True] * len(sentences)
    return _Corpus(tuple(texts), np.array(labels), np.array(described))


def _given_facts(pools: Sequence[DomainPool], outside: Sequence[DomainPool], axes: int | None) -> dict[str, Any]:
    """What was asked for, so that a saved toolkit can be told from one of other pools."""
    return {
        "candidates_fingerprint": pools_fingerprint(pools),
        "given_outside_fingerprint": pools_fingerprint(outside),
        "axes_asked": axes,
    }


def _axes_facts(
    candidates: Sequence[DomainPool], directions: np.ndarray, chosen: domain_axes.Selection
) -> dict[str, Any]:
    """The selection in the space of the candidates: theirs are the Gram matrix and the `whole` figures."""
    whole = domain_axes.select(directions, len(candidates))
    return {
        "space": domain_axes.SPACE,
        "candidates": [pool.name for pool in candidates],
        "chosen": [candidates[k].name for k in chosen.indices],
        "candidate_gram": np.round(domain_axes.gram(directions), 6).tolist(),
        "orthogonality": chosen.orthogonality,
        "coverage": chosen.coverage,
        "whole_orthogonality": whole.orthogonality,
        "whole_coverage": whole.coverage,
    }


@dataclass(frozen=True)
class _Recognition:
    """How the model's states tell the domains apart: `directions` [K, d], probes, and how sure each layer is.

    `held_out` [N] are the rows that the probes were not trained on, `auc` [L, K] theirs on prompts, `described_auc` on
    descriptions where every domain has some.
    """

    directions: np.ndarray
    axes: dict[str, Any]
    fitted: probes.Probes
    held_out: np.ndarray
    auc: np.ndarray
    described_auc: np.ndarray | None
    fits: dict[str, calibration.RegimeFit]

    def facts(self) -> dict[str, Any]:
        return {
            "axes": self.axes,
            "probes": _probe_facts(self.auc, self.described_auc, self.held_out),
            "calibration": _calibration_facts(self.fits),
        }


def _recognition(
    stages: Stages,
    corpus: _Corpus,
    pools: Sequence[DomainPool],
    outside: Sequence[DomainPool],
    seed: int,
    max_tokens: int,
    report: Progress,
) -> _Recognition:
    found = stages.features(corpus.texts, max_tokens, stage_of(report, "features"))
    directions, axes = _axes(found, corpus, pools)
    fitted, held_out = _probes(found, corpus, len(pools), seed, report)
    auc, described_auc = _aucs(fitted, found, corpus, held_out)
    fits = _calibrate(stages, fitted, found, corpus, held_out, outside, seed, max_tokens, report)
    return _Recognition(directions, axes, fitted, held_out, auc, described_auc, fits)


def _axes(found: np.ndarray, corpus: _Corpus, pools: Sequence[DomainPool]) -> tuple[np.ndarray, dict[str, Any]]:
    """The domains' own axes [K, d], and the facts of a selection that takes all of them."""
    rows = corpus.prompt_rows
    directions = domain_axes.domain_axes(found[rows], corpus.labels[rows], len(pools))
    return directions, _axes_facts(pools, directions, domain_axes.select(directions, len(pools)))


def _selected(
    stages: Stages, pools: Sequence[DomainPool], axes: int, max_tokens: int, report: Progress
) -> tuple[tuple[DomainPool, ...], tuple[DomainPool, ...], dict[str, Any]]:
    """The pools that become domains, the others, and what the selection looked at."""
    prompts = [prompt for pool in pools for prompt in pool.prompts]
    labels = np.repeat(range(len(pools)), [len(pool.prompts) for pool in pools])
    found = stages.features(prompts, max_tokens, stage_of(report, "candidates"))
    directions = domain_axes.domain_axes(found, labels, len(pools))
    chosen = domain_axes.select(directions, axes)
    inside = tuple(pools[k] for k in chosen.indices)
    rest = tuple(pool for pool in pools if pool not in inside)
    return inside, rest, _axes_facts(pools, directions, chosen)


def _probes(
    found: np.ndarray, corpus: _Corpus, domains: int, seed: int, report: Progress
) -> tuple[probes.Probes, np.ndarray]:
    """The probes, and the held-out flags [N] of the rows that they were not trained on."""
    report("probes", 0, 1)
    held_out = probes.split(2 * corpus.labels + corpus.is_description, seed)
    weights = probes.sample_weights(corpus.labels, corpus.is_description)
    fitted = probes.fit(found, corpus.labels, weights, ~held_out, domains)
    report("probes", 1, 1)
    return fitted, held_out


def _aucs(
    fitted: probes.Probes, found: np.ndarray, corpus: _Corpus, held_out: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """AUC [L, K] on held-out prompts, and on held-out descriptions where every domain has some."""
    prompts, described = (np.flatnonzero(held_out & kind) for kind in (~corpus.is_description, corpus.is_description))
    whole = len(np.unique(corpus.labels[described])) == fitted.weight.shape[1]
    return (
        probes.auc(fitted.logits(found[prompts]), corpus.labels[prompts]),
        probes.auc(fitted.logits(found[described]), corpus.labels[described]) if whole else None,
    )


def _calibrate(
    stages: Stages,
    fitted: probes.Probes,
    found: np.ndarray,
    corpus: _Corpus,
    held_out: np.ndarray,
    outside: Sequence[DomainPool],
    seed: int,
    max_tokens: int,
    report: Progress,
) -> dict[str, calibration.RegimeFit]:
    """Temperatures on text that the probes were not trained on: held-out rows, joined pairs of them, outside pools."""
    targets = np.eye(fitted.weight.shape[1])
    rows = np.flatnonzero(held_out & ~corpus.is_description)
    folds = calibration.folds_of(corpus.labels[rows], seed)
    fits = {"single": calibration.fit_regime(fitted.logits(found[rows]), targets[corpus.labels[rows]], folds)}
    # Pairs are made inside a fold: a prompt in two folds would let a temperature be judged on what fitted it.
    by_fold = [
        calibration.cross_pairs(corpus.labels, rows[folds == fold], CROSS_PER_PAIR // calibration.FOLDS, seed)
        for fold in range(calibration.FOLDS)
    ]
    pairs = [pair for fold in by_fold for pair in fold]
    joined = stages.features(
        [f"{corpus.texts[a]} {corpus.texts[b]}" for a, b in pairs], max_tokens, stage_of(report, "cross text")
    )
    both = np.array([targets[corpus.labels[a]] + targets[corpus.labels[b]] for a, b in pairs])
    pair_folds = np.repeat(range(calibration.FOLDS), [len(fold) for fold in by_fold])
    fits["cross"] = calibration.fit_regime(fitted.logits(joined), both, pair_folds)
    other = [prompt for pool in outside for prompt in pool.prompts]
    if other:
        foreign = stages.features(other, max_tokens, stage_of(report, "outside text"))
        none = np.zeros((len(other), len(targets)))
        # Judged on subjects that did not fit it, where there are two; unknown text is of yet another subject.
        subjects = np.repeat(range(len(outside)), [len(pool.prompts) for pool in outside])
        outside_folds = subjects if len(outside) > 1 else calibration.folds_of(subjects, seed)
        fits["outside"] = calibration.fit_regime(fitted.logits(foreign), none, outside_folds)
    return fits


def _probe_facts(auc: np.ndarray, described_auc: np.ndarray | None, held_out: np.ndarray) -> dict[str, Any]:
    """`auc_descriptions` says how far a scenario given as a sentence can be trusted; None without held-out ones."""
    per_layer = auc.mean(-1)
    return {
        "ridge": probes.RIDGE,
        "held_out": int(held_out.sum()),
        "auc_prompts": float(auc.mean()),
        "auc_descriptions": None if described_auc is None else float(described_auc.mean()),
        "auc_per_layer": [round(float(x), 4) for x in per_layer],
        "layers_near_chance": np.flatnonzero(per_layer < NEAR_CHANCE).tolist(),
    }


def _calibration_facts(fits: dict[str, calibration.RegimeFit]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        regime: {
            "ece_before": fit.ece_before,
            "ece_after": fit.ece_after,
            "texts": fit.texts,
            "mean_temperature": float(np.exp(fit.log_temperature).mean()),
        }
        for regime, fit in fits.items()
    }
    return facts | {"uncalibrated": [] if "outside" in fits else ["outside"]}


def _whitelist_facts(criterion: str, confirmed: Whitelist) -> dict[str, Any]:
    return {"criterion": criterion, "false_discovery": FALSE_DISCOVERY, "heads": int(confirmed.chosen.sum())}


def _versions() -> dict[str, Any]:
    import torch
    import transformers

    names = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    return {"versions": {**names, "numpy": np.__version__}}


def _f32(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=np.float32)
