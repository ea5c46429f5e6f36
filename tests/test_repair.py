"""The normal equations of the least-squares repair, and which positions they listen to."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sspcompile.model.text import Batch
from sspcompile.model.working import system_bytes
from sspcompile.repair.dense import SCORED_SHARE, position_weights
from sspcompile.repair.systems import Dual, Normal, system_of


def batch(lengths, scored):
    width = max(lengths)
    mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    score = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, n in enumerate(lengths):
        score[row, max(0, n - scored) : n] = True
    return Batch(tuple(range(len(lengths))), torch.zeros_like(mask), mask, score)


@given(st.lists(st.integers(2, 30), min_size=1, max_size=5), st.integers(1, 30))
def test_scored_positions_have_their_share_of_the_weight_or_more_whatever_the_lengths(lengths, scored):
    batches = [batch(lengths, scored), batch([9, 4], scored)]
    weights = position_weights(batches)
    on_scored = sum(float(w[b.score_mask].sum()) for w, b in zip(weights, batches, strict=True))
    in_all = sum(float(w[b.attention_mask.bool()].sum()) for w, b in zip(weights, batches, strict=True))
    count = sum(int(b.score_mask.sum()) for b in batches) / sum(int(b.attention_mask.sum()) for b in batches)
    assert abs(on_scored / in_all - max(SCORED_SHARE, count)) < 1e-5


@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
def test_weighted_normal_equations_solve_the_weighted_problem(seed, inputs):
    rng = np.random.default_rng(seed)
    x, y, w = rng.normal(size=(40, inputs)), rng.normal(size=(40, 3)), rng.uniform(0.1, 5, 40)
    system, firm = (Normal(inputs, 3, torch.device("cpu")) for _ in range(2))
    for part in (slice(0, 15), slice(15, 40)):
        for one in (system, firm):
            one.add(torch.tensor(x[part]), torch.tensor(y[part]), torch.tensor(w[part]))
    start = torch.zeros(inputs, 3, dtype=torch.float64)
    root = np.sqrt(w)[:, None]
    expected = np.linalg.lstsq(root * x, root * y, rcond=None)[0]
    np.testing.assert_allclose(system.solve(start, 1e-12).numpy(), expected, rtol=1e-6, atol=1e-8)
    # A ridge that outweighs the texts leaves the weights where they were.
    kept = torch.tensor(rng.normal(size=(inputs, 3)))
    np.testing.assert_allclose(firm.solve(kept, 1e12).numpy(), kept.numpy(), rtol=1e-6)


@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.sampled_from([1e-2, 0.1, 1.0]))
def test_few_rows_of_a_wide_matrix_have_the_same_solution_by_the_rows(seed, inputs, ridge):
    rng = np.random.default_rng(seed)
    x, y, w = (torch.tensor(one) for one in (rng.normal(size=(30, inputs)), rng.normal(size=(30, 3)), rng.random(30)))
    start = torch.tensor(rng.normal(size=(inputs, 3)))
    device = torch.device("cpu")
    exact, by_rows = Normal(inputs, 3, device), Dual(device)
    for part in (slice(0, 11), slice(11, 30)):
        for system in (exact, by_rows):
            system.add(x[part], y[part], w[part])
    wanted = exact.solve(start, ridge)
    torch.testing.assert_close(by_rows.solve(start, ridge), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert isinstance(system_of(30, inputs, 3, device), Dual if inputs > 30 else Normal)


@given(st.integers(0, 2**32 - 1), st.integers(2, 600), st.sampled_from([1e-2, 1.0]), st.booleans())
@settings(max_examples=20)
def test_a_system_that_is_factored_in_its_place_has_the_solution_of_one_beside_its_sums(seed, inputs, ridge, exact):
    rng = np.random.default_rng(seed)
    x, y, w = (torch.tensor(one) for one in (rng.normal(size=(40, inputs)), rng.normal(size=(40, 3)), rng.random(40)))
    start, system = torch.tensor(rng.normal(size=(inputs, 3))), Normal(inputs, 3, torch.device("cpu"), exact=exact)
    system.add(x, y, w)
    given_start, strength = (
        start.clone(),
        ridge * system.xx.diagonal().clamp_min(1e-6 * float(system.xx.diagonal().mean())),
    )
    wanted = torch.linalg.solve(system.xx + torch.diag(strength), system.xy + strength[:, None] * start)
    torch.testing.assert_close(system.solve(start, ridge), wanted, rtol=1e-9, atol=1e-11)
    assert start.equal(given_start)


def test_a_singular_system_without_a_ridge_is_an_error():
    system = Normal(3, 1, torch.device("cpu"))
    system.add(torch.ones(5, 3), torch.ones(5, 1), torch.ones(5))
    with pytest.raises(torch.linalg.LinAlgError):
        system.solve(torch.zeros(3, 1), 0.0)


PEAK = """
import sys, torch
from sspcompile.bench.memory import peak_resident_bytes as peak
from sspcompile.repair.systems import Normal
inputs, outputs, exact = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
x, y, start = torch.randn(64, inputs), torch.randn(64, outputs), torch.randn(inputs, outputs)
def solved(inputs, outputs):
    system = Normal(inputs, outputs, torch.device("cpu"), exact=exact)
    system.add(x[:, :inputs], y[:, :outputs], torch.ones(64))
    return system.solve(start[:inputs, :outputs], 1.0)
solved(50, 10)
before = peak()
solved(inputs, outputs)
print(peak() - before)
"""


@pytest.mark.parametrize(("inputs", "outputs", "exact"), [(2400, 600, False), (2400, 600, True), (1600, 1600, False)])
def test_a_system_takes_what_is_reserved_for_it(inputs, outputs, exact):
    command = [sys.executable, "-c", PEAK, *map(str, (inputs, outputs, exact))]
    # As below a stated limit: freed blocks of 4 MB go back at once. By its own rule the C library sometimes keeps one.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(4 << 20)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = int(done.stdout)
    reserved = system_bytes(inputs, outputs, exact=exact)
    assert 0.85 * reserved < found < 1.1 * reserved


@given(st.integers(0, 2**32 - 1), st.sampled_from([8, 60]), st.sampled_from([0.1, 1.0]))
def test_a_repair_is_the_same_in_whatever_unit_an_input_comes(seed, inputs, ridge):
    """A loud input may not say how firmly the quiet ones are held."""
    rng = np.random.default_rng(seed)
    x, y = torch.tensor(rng.normal(size=(30, inputs))), torch.tensor(rng.normal(size=(30, 3)))
    start, unit = torch.tensor(rng.normal(size=(inputs, 3))), torch.tensor(10 ** rng.uniform(-1, 1, inputs))
    for kind in (lambda: Normal(inputs, 3, torch.device("cpu")), lambda: Dual(torch.device("cpu"))):
        plain, scaled = kind(), kind()
        plain.add(x, y, torch.ones(30))
        scaled.add(x * unit, y, torch.ones(30))
        found = scaled.solve(start / unit[:, None], ridge) * unit[:, None]
        torch.testing.assert_close(found, plain.solve(start, ridge), rtol=1e-4, atol=1e-4)


def test_an_input_that_no_text_excites_keeps_its_weights():
    rng = np.random.default_rng(0)
    x, start = torch.tensor(rng.normal(size=(30, 4))), torch.tensor(rng.normal(size=(4, 2)))
    x[:, 2] = 0
    for system in (Normal(4, 2, torch.device("cpu")), Dual(torch.device("cpu"))):
        system.add(x, torch.tensor(rng.normal(size=(30, 2))), torch.ones(30))
        assert (system.solve(start, 1.0)[2] - start[2]).abs().max() < 1e-6


def test_rows_of_zeros_change_nothing():
    start = torch.ones(5, 2, dtype=torch.float64)
    for system in (Normal(5, 2, torch.device("cpu")), Dual(torch.device("cpu"))):
        system.add(torch.zeros(3, 5), torch.ones(3, 2), torch.ones(3))
        assert system.solve(start, 0.1).equal(start)
