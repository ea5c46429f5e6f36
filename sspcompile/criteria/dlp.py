"""DLP: layers whose weights are mostly unimportant give more heads; within a layer, heads go by Wanda.

Chen et al., DLP: Dynamic Layerwise Pruning in Large Language Models, arXiv 2505.23807 (formulas as in copies of the
authors' code, strategy "median"; the paper's text was not at hand): the unimportance u of a layer is the median of
Wanda's |W_ij| * |X_j|_2 over its weights, its importance 1 - u / sum of u. Importance is stretched to lie between 0 and
2 alpha, alpha = 0.15, and centred: so much more than the mean rate does a layer keep, whatever the budget.
Adapted: the weights are those of o_proj, which are Wanda's here; the paper takes all linear weights of a block, and
prunes all of them. A score has no budget, so the rates are part of it: with `share` in [0, 1] the stretched importance
of the layer, and `place` (0 = best) that of a unit among the layer's `count` by `wanda`,

    score = 2 alpha share + 1 - (place + 1/2) / count

A threshold on it keeps, at a rate r, r plus the layer's deviation of its units, rounded to whole ones.
"""

from __future__ import annotations

import numpy as np
import torch

from sspcompile.criteria.channels import moments, output_weight
from sspcompile.criteria.units import CriterionInput, Units
from sspcompile.criteria.wanda import head_products
from sspcompile.model.decoder import LoadedModel

ALPHA = 0.15


def dlp(loaded: LoadedModel, given: CriterionInput) -> np.ndarray:
    """[L, U]"""
    units = Units.of(loaded.geometry, given.granularity)
    found = moments(loaded, given)
    medians = [_median(loaded, layer, found.root_mean_square[layer]) for layer in range(units.layers)]
    return by_rates(units.sum(head_products(loaded, found)), np.array(medians))


def by_rates(values: np.ndarray, medians: np.ndarray) -> np.ndarray:
    """Scores [L, U] that order the units of a layer as `values` [L, U] do, and layers by `medians` [L]."""
    reach = np.ptp(medians)
    share = (medians.max() - medians) / reach if reach > 0 else np.zeros_like(medians)
    count = values.shape[1]
    places = np.argsort(np.argsort(-values, axis=1, kind="stable"), axis=1)
    return 2 * ALPHA * share[:, None] + 1 - (places + 0.5) / count


def _median(loaded: LoadedModel, layer: int, norms: np.ndarray) -> float:
    """Of |W_ij| * |X_j| over o_proj; of an even number the lower of the two in the middle."""
    weight = output_weight(loaded, layer).abs()
    return float((weight * torch.from_numpy(norms).to(weight)).median())
