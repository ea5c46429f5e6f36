"""The direction in the residual stream that stands for a domain, layer by layer: what the `subspace` criteria read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sspcompile.prepare import probes
from sspcompile.prepare.recognition import Corpus, corpus_of, recognised_part, recognised_tokens
from sspcompile.prepare.stages import Stages
from sspcompile.progress import Progress, stage_of
from sspcompile.request.domains import DomainPool

NEAR_CHANCE = 0.6  # mean AUC of a layer below this is reported


def probe_directions(
    stages: Stages, pools: Sequence[DomainPool], seed: int, max_tokens: int, report: Progress
) -> tuple[np.ndarray, dict[str, Any]]:
    """Unit directions [L, K, d] of probes in every layer, and how well those tell held-out text apart.

    They read the texts that recognition reads, in all layers, and as heads are scored: through the chat template.
    """
    corpus = corpus_of(recognised_part(pools))
    found = stages.features(corpus.texts, recognised_tokens(max_tokens), stage_of(report, "features of all layers"))
    report("probes", 0, 1)
    held_out = probes.split(2 * corpus.labels + corpus.is_description, seed)
    weights = probes.sample_weights(corpus.labels, corpus.is_description)
    fitted = probes.fit(found, corpus.labels, weights, ~held_out, len(pools))
    report("probes", 1, 1)
    return fitted.directions(), _facts(fitted, found, corpus, held_out)


def _facts(fitted: probes.Probes, found: np.ndarray, corpus: Corpus, held_out: np.ndarray) -> dict[str, Any]:
    """AUC on held-out prompts, and on held-out descriptions where every domain has some (else None)."""
    prompts, described = (np.flatnonzero(held_out & kind) for kind in (~corpus.is_description, corpus.is_description))
    auc = probes.auc(fitted.logits(found[prompts]), corpus.labels[prompts])
    whole = len(np.unique(corpus.labels[described])) == auc.shape[1]
    per_layer = auc.mean(-1)
    return {
        "ridge": probes.RIDGE,
        "held_out": int(held_out.sum()),
        "auc_prompts": float(auc.mean()),
        "auc_descriptions": (
            float(probes.auc(fitted.logits(found[described]), corpus.labels[described]).mean()) if whole else None
        ),
        "auc_per_layer": [round(float(x), 4) for x in per_layer],
        "layers_near_chance": np.flatnonzero(per_layer < NEAR_CHANCE).tolist(),
    }
