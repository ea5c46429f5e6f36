"""Bonsai: regress the damage of random sub-models on what they close; forward passes only.

Kolawole, Dery et al., Everybody Prune Now: Structured Pruning of LLMs with only Forward Passes, arXiv 2402.05406,
section 3: sub-models are sampled, their utility is measured, and a regularised linear regression of the utility on
the indicators of the modules gives each module's relevance.
Adapted: the utility is the divergence from the dense model instead of the perplexity, which needs no labels; a
sub-model closes an eighth of the units; units are drawn without a prior and equally often; one round. The cost of
closing nothing is zero, so the regression has no intercept. The ridge strength is chosen by leave-one-out
cross-validation.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.linear_model import RidgeCV

from sspcompile.criteria.units import CriterionInput, Units
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.divergence import token_kl
from sspcompile.model.hooks import head_gates
from sspcompile.model.logits import decoder_output, mean_by_sequence, scored_logits

CLOSED_SHARE = 1 / 8
MASKS_PER_UNIT = 4
FEWEST_MASKS, MOST_MASKS = 32, 1024
RIDGES = np.logspace(-3, 2, 11)


def mask_count(units: int) -> int:
    """How many sub-models are measured for a model of so many units."""
    return min(MOST_MASKS, max(FEWEST_MASKS, MASKS_PER_UNIT * units))


def bonsai(loaded: LoadedModel, given: CriterionInput) -> np.ndarray:
    """[L, U]: the rise of the divergence in nats that the regression gives a unit, the lowest made zero if below it."""
    units = Units.of(loaded.geometry, given.granularity)
    closed = draw_masks(units.total, mask_count(units.total), given.seed)
    damage = _damage(loaded, given, units, closed)
    fitted = RidgeCV(alphas=RIDGES, fit_intercept=False).fit(closed.astype(np.float64), damage)
    found = fitted.coef_.reshape(units.layers, units.count)
    return found - min(0.0, float(found.min()))


def draw_masks(total: int, count: int, seed: int) -> np.ndarray:
    """Bool [count, total], true where a sub-model closes a unit. Cut from shuffles: all are closed equally often."""
    rng = np.random.default_rng(seed)
    size = min(total, max(2, round(CLOSED_SHARE * total)))
    masks = np.zeros((count, total), dtype=bool)
    deck: list[int] = []
    for mask in masks:
        if len(deck) < size:
            deck = rng.permutation(total).tolist()
        mask[deck[:size]] = True
        deck = deck[size:]
    return masks


@torch.inference_mode()
def _damage(loaded: LoadedModel, given: CriterionInput, units: Units, closed: np.ndarray) -> np.ndarray:
    """Mean KL(dense || sub-model) over prompts, in nats, [masks]."""
    gates = torch.from_numpy(~closed).float().view(-1, units.layers, units.count).to(loaded.device)
    damage = np.zeros(len(closed))
    for index, batch in enumerate(given.batches):
        dense = scored_logits(loaded, decoder_output(loaded, batch), batch.score_mask)
        for number, gate in enumerate(gates):
            with head_gates(loaded, units.gates(gate)):
                other = scored_logits(loaded, decoder_output(loaded, batch), batch.score_mask)
            damage[number] += float(mean_by_sequence(token_kl(dense, other), batch.score_mask).sum())
        given.report(index + 1, len(given.batches))
    return damage / given.prompts
