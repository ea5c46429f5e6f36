"""How a model's states tell the domains apart: the domains' axes, and a recogniser of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sspcompile.prepare import axes as domain_axes
from sspcompile.prepare.calibration import folds_of
from sspcompile.prepare.learning import FALSE_ALARM, Examples, Learned, learn
from sspcompile.prepare.probes import sample_weights
from sspcompile.prepare.recogniser import Recogniser
from sspcompile.prepare.stages import Stages
from sspcompile.progress import Progress, stage_of
from sspcompile.request.domains import DomainPool
from sspcompile.request.splits import thinned

# What a text is about shows in so many tokens: more cost time and name nothing better (docs/quality.md).
RECOGNITION_TOKENS = 64
# Of each domain. Twice as many as were read of narrower pools cost half as many tokens again (docs/quality.md).
RECOGNITION_PROMPTS = 128
# Of each outside subject.
OUTSIDE_PROMPTS = 80
# The middles of so many equal parts of the model. Ending two thirds up would save a third of the pass and name domains
# as well, but find less of what is unknown (docs/quality.md).
LAYERS_READ = 5
FOLDS = 4


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


def layers_read(layers: int) -> list[int]:
    """The layers that recognition reads of a model with so many, ascending."""
    return sorted({layers * (2 * part + 1) // (2 * LAYERS_READ) for part in range(LAYERS_READ)})


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
    """How the model's states tell the domains apart: their axes [K, d], the recogniser, and `facts` on both."""

    axes: np.ndarray
    recogniser: Recogniser
    facts: dict[str, Any]


def recognise(
    stages: Stages,
    pools: Sequence[DomainPool],
    outside: Sequence[DomainPool],
    seed: int,
    max_tokens: int,
    report: Progress,
) -> Recognition:
    """Learn to tell the pools apart, from a part of their prompts; `outside` teaches what none of them is."""
    corpus, max_tokens = corpus_of(recognised_part(pools)), recognised_tokens(max_tokens)
    outside, layers = recognised_part(outside, OUTSIDE_PROMPTS), layers_read(stages.layers)
    foreign = [prompt for pool in outside for prompt in pool.prompts]
    found = stages.features(corpus.texts, max_tokens, stage_of(report, "features"), layers=layers, bare=True)
    directions, axes = _axes(found, corpus, pools)
    none = found[:0]
    if foreign:
        none = stages.features(foreign, max_tokens, stage_of(report, "other subjects"), layers=layers, bare=True)
    report("recognition", 0, 1)
    examples = _examples(found, none, corpus, outside, len(pools), seed)
    learned = learn(examples, np.array(layers))
    report("recognition", 1, 1)
    described = np.concatenate([corpus.is_description, np.zeros(len(none), dtype=bool)])
    facts = {"axes": axes, "recognition": _facts(learned, examples, described)}
    return Recognition(directions, learned.recogniser, facts)


def _examples(
    found: np.ndarray, none: np.ndarray, corpus: Corpus, outside: Sequence[DomainPool], domains: int, seed: int
) -> Examples:
    """The corpus and the text of no domain, `none`, with features [N, R, d] each. All folds have alike of every domain,
    of its prompts and of its sentences, and of every outside subject.
    """
    subjects = np.repeat(range(len(outside)), [len(pool.prompts) for pool in outside]).astype(int)
    classes = np.concatenate([corpus.labels, np.full(len(none), domains)])
    described = np.concatenate([corpus.is_description, np.zeros(len(none), dtype=bool)])
    kinds = np.concatenate([2 * corpus.labels + corpus.is_description, 2 * domains + subjects])
    return Examples(
        np.concatenate([found, none]),
        classes,
        sample_weights(classes, described),
        folds_of(kinds, FOLDS, seed),
        np.concatenate([np.full(len(found), -1), subjects]),
        domains,
    )


def _facts(learned: Learned, examples: Examples, described: np.ndarray) -> dict[str, Any]:
    """All figures are of texts that their fit did not see. `unseen_found` is of subjects that it did not see either."""
    recogniser, inside = learned.recogniser, examples.inside
    named = learned.held_out[:, : examples.domains].argmax(-1) == examples.classes
    line = float(recogniser.unknown_line[0])
    return {
        "layers": recogniser.layers.tolist(),
        "texts": len(inside),
        "ridge": learned.ridge,
        "temperature": float(np.exp(recogniser.log_temperature[0])),
        "named_right_prompts": float(named[inside & ~described].mean()),
        "named_right_descriptions": float(named[inside & described].mean()) if (inside & described).any() else None,
        "false_alarm": FALSE_ALARM,
        "unknown_line": line,
        "unknown_found": None if inside.all() else float((learned.held_out[~inside, -1] > line).mean()),
        "unseen_found": None if learned.unseen is None else float((learned.unseen > line).mean()),
        "ece_before": learned.ece_before,
        "ece_after": learned.ece_after,
    }


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
    tokens, layers = recognised_tokens(max_tokens), layers_read(stages.layers)
    found = stages.features(prompts, tokens, stage_of(report, "candidates"), layers=layers, bare=True)
    directions = domain_axes.domain_axes(found, labels, len(pools))
    chosen = domain_axes.select(directions, axes)
    inside = tuple(pools[k] for k in chosen.indices)
    rest = tuple(pool for pool in pools if pool not in inside)
    return inside, rest, _axes_facts(pools, directions, chosen)


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
