"""Greedy output approximation: the heads whose writes reconstruct a layer's attention output best.

Li et al., Greedy Output Approximation: Towards Efficient Structured Pruning for LLMs Without Retraining, arXiv
2407.19126, prune by how well the layer's output is approximated. Here the selection is orthogonal matching pursuit
(Pati et al., 1993) over heads: with w_h [tokens, d] the write of head h (its slice of the o_proj input times its
columns) and Y their sum, each step adds the head that lowers min_a |Y - sum_h a_h w_h|^2 most, all factors a being
fitted anew. A head's score is the share of |Y|^2 that its step explains, never above that of an earlier step. The
scores of a layer add up to about 1, so layers count alike: use it to rank heads within layers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sspcompile.criteria.channels import head_columns
from sspcompile.criteria.units import CriterionInput, Units, rising
from sspcompile.model.capture import capture
from sspcompile.model.decoder import LoadedModel

WRITES_ELEMENTS = 2**24  # writes [tokens, H, d] held at a time


def greedy_output(loaded: LoadedModel, given: CriterionInput) -> np.ndarray:
    """[L, U]"""
    units = Units.of(loaded.geometry, given.granularity)
    grams = _head_grams(loaded, given).reshape(units.layers, units.count, units.size, units.count, units.size)
    return np.stack([pursue(gram) for gram in grams.sum((2, 4))])


def pursue(gram: np.ndarray) -> np.ndarray:
    """Scores [U] from the inner products [U, U] of the writes; zero where nothing is written at all."""
    count = len(gram)
    with_output = gram.sum(1)  # inner product of each write with their sum
    energy = float(gram.sum())
    scores = np.zeros(count)
    if not energy > 0:
        return scores
    chosen: list[int] = []
    explained, gains = 0.0, []
    while len(chosen) < count:
        reached = {unit: _explained(gram, with_output, [*chosen, unit]) for unit in range(count) if unit not in chosen}
        best = max(reached, key=lambda unit: (reached[unit], -unit))
        gains.append(max(0.0, reached[best] - explained) / energy)
        explained = reached[best]
        chosen.append(best)
    scores[chosen[::-1]] = rising(gains[::-1])
    return scores


def _explained(gram: np.ndarray, with_output: np.ndarray, chosen: list[int]) -> float:
    """|Y|^2 minus the squared error of the least-squares fit of Y by the chosen writes."""
    target = with_output[chosen]
    factors = np.linalg.lstsq(gram[np.ix_(chosen, chosen)], target, rcond=1e-12)[0]
    return float(target @ factors)


def _head_grams(loaded: LoadedModel, given: CriterionInput) -> np.ndarray:
    """Inner products of the heads' writes, summed over real tokens and divided by their number, [L, H, H] float64."""
    g = loaded.geometry
    grams = torch.zeros(g.layers, g.heads, g.heads, dtype=torch.float64)
    step = max(1, WRITES_ELEMENTS // (g.heads * g.hidden))
    tokens = 0
    for index, batch in enumerate(given.batches):
        real = batch.attention_mask.bool()

        def read(layer: int, x: Tensor, real: Tensor = real) -> None:
            columns = head_columns(loaded, layer)  # [H, d, D]
            for part in x[real.to(x.device)].float().unflatten(-1, (g.heads, g.head_dim)).split(step):
                writes = torch.einsum("hdc,thc->htd", columns, part).flatten(1).double()
                grams[layer] += (writes @ writes.T).cpu()

        capture(loaded, batch, read)
        tokens += int(real.sum())
        given.report(index + 1, len(given.batches))
    return (grams / max(1, tokens)).numpy()
