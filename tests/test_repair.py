"""The normal equations of the least-squares repair, and which positions they listen to."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from sspcompile.model.text import Batch
from sspcompile.repair.fitting import SCORED_SHARE, _Normal, _position_weights


def batch(lengths, scored):
    width = max(lengths)
    mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    score = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, n in enumerate(lengths):
        score[row, max(0, n - scored) : n] = True
    return Batch(tuple(range(len(lengths))), torch.zeros_like(mask), mask, score)


@given(st.lists(st.integers(2, 30), min_size=1, max_size=5), st.integers(1, 6))
def test_scored_positions_have_their_share_of_the_weight_whatever_the_lengths(lengths, scored):
    batches = [batch(lengths, scored), batch([9, 4], scored)]
    weights = _position_weights(batches)
    on_scored = sum(float(w[b.score_mask].sum()) for w, b in zip(weights, batches, strict=True))
    in_all = sum(float(w[b.attention_mask.bool()].sum()) for w, b in zip(weights, batches, strict=True))
    if not all(bool((b.score_mask == b.attention_mask.bool()).all()) for b in batches):
        assert abs(on_scored / in_all - SCORED_SHARE) < 1e-5


@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
def test_weighted_normal_equations_solve_the_weighted_problem(seed, inputs):
    rng = np.random.default_rng(seed)
    x, y, w = rng.normal(size=(40, inputs)), rng.normal(size=(40, 3)), rng.uniform(0.1, 5, 40)
    system = _Normal(inputs, 3, torch.device("cpu"))
    for part in (slice(0, 15), slice(15, 40)):
        system.add(torch.tensor(x[part]), torch.tensor(y[part]), torch.tensor(w[part]))
    start = torch.zeros(inputs, 3, dtype=torch.float64)
    root = np.sqrt(w)[:, None]
    expected = np.linalg.lstsq(root * x, root * y, rcond=None)[0]
    np.testing.assert_allclose(system.solve(start, 1e-12).numpy(), expected, rtol=1e-6, atol=1e-8)
    # A ridge that outweighs the texts leaves the weights where they were.
    kept = torch.tensor(rng.normal(size=(inputs, 3)))
    np.testing.assert_allclose(system.solve(kept, 1e12).numpy(), kept.numpy(), rtol=1e-6)
