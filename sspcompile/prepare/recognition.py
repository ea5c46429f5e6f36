"""How a model's states tell the domains apart: axes, probes, and how sure each layer is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sspcompile.prepare import axes as domain_axes
from sspcompile.prepare import calibration, probes
from sspcompile.prepare.stages import Stages
from sspcompile.progress import Progress, stage_of
from sspcompile.request.domains import DomainPool
from sspcompile.request.splits import thinned

# What a text is about shows in so many tokens, and a domain in so many of its prompts: more cost time and name nothing
# better (benchmarks/recognition.py).
RECOGNITION_TOKENS = 64
RECOGNITION_PROMPTS = 64
# Of each outside subject. Where there are so many subjects, every other prompt teaches the probes what no domain is,
# and the others calibrate.
OUTSIDE_PROMPTS = 50
ENOUGH_SUBJECTS = 4
# Joined texts of two domains, of all pairs together and of each.
CROSS_TEXTS, CROSS_PER_PAIR = 300, 6
NEAR_CHANCE = 0.6  # mean AUC of a layer below this is reported


@dataclass(frozen=True)
class Corpus:
    """All pool text in one list: prompts and descriptions of domain 0, then of domain 1, and so on."""

    texts: tuple[str, ...]
    labels: np.ndarray  # [N]
    is_description: np.ndarray  # [N] bool

    @property
    def prompt_rows(self) -> np.ndarray:
        return np.flatnonzero(~self.is_description)


def recognised_tokens(max_tokens: int) -> int:
    """How many tokens of a text are read to see what it is about, where a build reads `max_tokens`."""
    return min(max_tokens, RECOGNITION_TOKENS)


def recognised_part(pools: Sequence[DomainPool], prompts: int = RECOGNITION_PROMPTS) -> tuple[DomainPool, ...]:
    """The pools with as many of their prompts as domains are learned from, evenly spaced."""
    return tuple(replace(pool, prompts=thinned(pool.prompts, prompts)) for pool in pools)


def pairs_of(domains: int) -> int:
    """How many joined texts each pair of so many domains gives: as many in every fold, one at least."""
    pairs = domains * (domains - 1) // 2
    return calibration.FOLDS * max(1, min(CROSS_PER_PAIR, CROSS_TEXTS // pairs) // calibration.FOLDS)


def corpus_of(pools: Sequence[DomainPool]) -> Corpus:
    texts: list[str] = []
    labels: list[int] = []
    described: list[bool] = []
    for k, pool in enumerate(pools):
        sentences = (pool.description, *(d for d in pool.descriptions if d != pool.description))
        sentences = tuple(text for text in sentences if text.strip())
        texts += [*pool.prompts, *sentences]
        labels += [k] * (len(pool.prompts) + len(sentences))
        described += [False] * len(pool.prompts) + [True] * len(sentences)
    return Corpus(tuple(texts), np.array(labels), np.array(described))


@dataclass(frozen=True)
class Recognition:
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


def recognise(
    stages: Stages,
    pools: Sequence[DomainPool],
    outside: Sequence[DomainPool],
    seed: int,
    max_tokens: int,
    report: Progress,
) -> Recognition:
    """Learn to tell the pools apart, from a part of their prompts; texts of none calibrate."""
    corpus, max_tokens = corpus_of(recognised_part(pools)), recognised_tokens(max_tokens)
    outside = recognised_part(outside, OUTSIDE_PROMPTS)
    foreign: list[str] = []
    if len(outside) >= ENOUGH_SUBJECTS:
        foreign = [prompt for pool in outside for prompt in pool.prompts[::2]]
        outside = tuple(replace(pool, prompts=pool.prompts[1::2]) for pool in outside)
    found = stages.features(corpus.texts, max_tokens, stage_of(report, "features"))
    directions, axes = _axes(found, corpus, pools)
    none = stages.features(foreign, max_tokens, stage_of(report, "other subjects")) if foreign else found[:0]
    fitted, held_out = _probes(found, none, corpus, len(pools), seed, report)
    auc, described_auc = _aucs(fitted, found, corpus, held_out)
    fits = _calibrate(stages, fitted, found, corpus, held_out, outside, seed, max_tokens, report)
    return Recognition(directions, axes, fitted, held_out, auc, described_auc, fits)


def _axes(found: np.ndarray, corpus: Corpus, pools: Sequence[DomainPool]) -> tuple[np.ndarray, dict[str, Any]]:
    """The domains' own axes [K, d], and the facts of a selection that takes all of them."""
    rows = corpus.prompt_rows
    directions = domain_axes.domain_axes(found[rows], corpus.labels[rows], len(pools))
    return directions, _axes_facts(pools, directions, domain_axes.select(directions, len(pools)))


def selected_axes(
    stages: Stages, pools: Sequence[DomainPool], axes: int, max_tokens: int, report: Progress
) -> tuple[tuple[DomainPool, ...], tuple[DomainPool, ...], dict[str, Any]]:
    """The pools that become domains, the others, and what the selection looked at."""
    read = recognised_part(pools)
    prompts = [prompt for pool in read for prompt in pool.prompts]
    labels = np.repeat(range(len(read)), [len(pool.prompts) for pool in read])
    found = stages.features(prompts, recognised_tokens(max_tokens), stage_of(report, "candidates"))
    directions = domain_axes.domain_axes(found, labels, len(pools))
    chosen = domain_axes.select(directions, axes)
    inside = tuple(pools[k] for k in chosen.indices)
    rest = tuple(pool for pool in pools if pool not in inside)
    return inside, rest, _axes_facts(pools, directions, chosen)


def _probes(
    found: np.ndarray, none: np.ndarray, corpus: Corpus, domains: int, seed: int, report: Progress
) -> tuple[probes.Probes, np.ndarray]:
    """The probes, from features [N, L, d] of the corpus and of text of no domain, `none`, and the held-out flags [N] of
    the rows of the corpus that they were not trained on.
    """
    report("probes", 0, 1)
    held_out = probes.split(2 * corpus.labels + corpus.is_description, seed)
    labels = np.concatenate([corpus.labels, np.full(len(none), -1)])
    described = np.concatenate([corpus.is_description, np.zeros(len(none), dtype=bool)])
    train = np.concatenate([~held_out, np.ones(len(none), dtype=bool)])
    weights = probes.sample_weights(labels, described)
    fitted = probes.fit(np.concatenate([found, none]), labels, weights, train, domains)
    report("probes", 1, 1)
    return fitted, held_out


def _aucs(
    fitted: probes.Probes, found: np.ndarray, corpus: Corpus, held_out: np.ndarray
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
    corpus: Corpus,
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
        calibration.cross_pairs(corpus.labels, rows[folds == fold], pairs_of(len(targets)) // calibration.FOLDS, seed)
        for fold in range(calibration.FOLDS)
    ]
    pairs = [pair for fold in by_fold for pair in fold]
    joined = stages.features(
        # Both of them are to be in what is read.
        [f"{corpus.texts[a]} {corpus.texts[b]}" for a, b in pairs],
        2 * max_tokens,
        stage_of(report, "cross text"),
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
