"""Repairs as low-rank differences: the best of their rank, within the budget whichever member came first."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import Shape, make_checkpoint

from sspcompile.checkpoint import Checkpoint
from sspcompile.checkpoint.headers import read_words
from sspcompile.errors import ArtifactError
from sspcompile.model.loading import load
from sspcompile.model.modules import down_proj, o_proj
from sspcompile.model.stored import STORED_DTYPES, as_tensor
from sspcompile.model.text import Batch
from sspcompile.nested.low_rank import (
    LowRank,
    difference,
    file_tensors,
    from_file,
    low_rank,
    numbers,
    rank_bytes,
    refitted,
    words_of,
)
from sspcompile.nested.order import Order, Prefix
from sspcompile.nested.truncating import Energies, Pool, _difference, energies_of, places_of
from sspcompile.repair.dense import position_weights
from sspcompile.repair.repair import Repair, masked
from sspcompile.slicing.mask import Kept

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    return make_checkpoint(folder / "model", Shape(layers=2))


@pytest.fixture(scope="module")
def problem(dense):
    """Two members of a model, with a random repair and random energies of inputs."""
    checkpoint, rng = Checkpoint(dense), np.random.default_rng(3)
    g = checkpoint.geometry
    order = Order(((1, 0), (0, 1)), tuple(tuple(rng.permutation(g.intermediate).tolist()) for _ in range(g.layers)))
    places = [places_of(checkpoint, order, prefix) for prefix in (Prefix((2, 1), (40, 30)), Prefix((1, 1), (24, 20)))]
    repairs = []
    for scale in (0.01, 0.02):
        inputs = g.heads * g.head_dim, g.intermediate
        found = [
            {layer: torch.from_numpy(rng.normal(0, scale, (g.hidden, n)).astype(np.float32)) for layer in range(2)}
            for n in inputs
        ]
        repairs.append(Repair(found[0], down=found[1]))
    energies = Energies(
        *(tuple(torch.from_numpy(rng.random(n) ** 4) for _ in range(2)) for n in (g.heads * g.head_dim, g.intermediate))
    )
    return checkpoint, places, repairs, energies


def pooled(problem, budget, members):
    checkpoint, places, repairs, energies = problem
    pool = Pool(checkpoint, budget)
    for member in members:
        pool.add(member, places[member], repairs[member], energies, CPU)
    return [pool.stored(member) for member in (0, 1)]


def words(stored):
    return {name: one for found in stored for name, one in file_tensors(found).items()}


def test_a_budget_is_spent_alike_whichever_member_came_first(problem):
    whole = sum(one.nbytes for one in words(pooled(problem, 1 << 30, (0, 1))).values())
    for share in (0.1, 0.35, 0.8):
        stored = pooled(problem, int(share * whole), (0, 1))
        turned = pooled(problem, int(share * whole), (1, 0))
        for one, other in zip(stored, turned, strict=True):
            assert sorted(one) == sorted(other)
            assert all(np.array_equal(file_tensors(one)[k], v) for k, v in file_tensors(other).items())
        taken = sum(words_.nbytes for found in stored for words_ in file_tensors(found).values())
        assert 0.8 * share * whole < taken <= share * whole


def exact_of(problem, member, place):
    """What a member's refit changes, [out, in], and the roots of its inputs' energies."""
    checkpoint, _, repairs, energies = problem
    prefix = read_words(checkpoint.tensors[place.name])[:, place.columns]
    repair = repairs[member]
    fitted = (repair.down if place.down else repair.weights)[place.layer][:, place.columns].double()
    root = (energies.down if place.down else energies.o_proj)[place.layer][place.columns].sqrt()
    return fitted.numpy() - numbers(prefix, "F32"), root.numpy()


def lost(problem, member, place, stored) -> float:
    """The share of a difference's energy that what is stored of it misses."""
    exact, root = exact_of(problem, member, place)
    outputs, inputs = difference(stored)
    return float(np.square((exact - outputs @ inputs) * root).sum() / np.square(exact * root).sum())


def test_with_room_for_everything_nothing_is_missed_but_what_a_byte_rounds(problem):
    _, places, _, _ = problem
    for member, stored in enumerate(pooled(problem, 1 << 30, (0, 1))):
        assert set(stored) == {place.name for place in places[member]}
        assert all(lost(problem, member, place, stored[place.name]) < 1e-3 for place in places[member])


@pytest.mark.parametrize(("rows", "in_full"), [(20, True), (64, False)])
def test_a_matrix_whose_factors_take_more_is_kept_in_full(problem, rows, in_full):
    """All directions of a square one in numbers of two bytes do, those of a narrow one do not."""
    columns, place = 20, replace(problem[1][0][0], dtype="BF16")
    weight = torch.from_numpy(np.random.default_rng(0).normal(size=(rows, columns))).bfloat16()
    prefix, energy = words_of(np.zeros((rows, columns)), "BF16"), torch.ones(columns, dtype=torch.float64)
    found = _difference(0, place, weight, prefix, energy, CPU)
    assert isinstance(found.stored, LowRank) != in_full
    assert in_full == (columns * rank_bytes(rows, columns) > 2 * rows * columns)
    assert found.cost.sum() == sum(words.nbytes for words in file_tensors({"a": found.stored}).values())


def test_a_difference_is_the_best_of_its_rank_in_the_metric_of_the_inputs(problem):
    _, places, _, _ = problem
    (stored, _) = pooled(problem, 3000, (0,))
    assert stored and all(isinstance(one, LowRank) for one in stored.values())
    for place in places[0]:
        if (one := stored.get(place.name)) is None:
            continue
        exact, root = exact_of(problem, 0, place)
        values = np.square(np.linalg.svd(exact * root, compute_uv=False))
        assert lost(problem, 0, place, one) == pytest.approx(
            values[one.rank :].sum() / values.sum(), rel=1e-2, abs=1e-4
        )


def test_energies_are_those_of_the_repaired_member_as_shares_of_the_stream(dense, problem):
    _, _, repairs, _ = problem
    loaded = load(dense, fingerprint="", dtype=torch.float64)
    g = loaded.geometry
    kept = Kept(np.array([[True, True, False, False], [True] * 4]), np.arange(g.intermediate) % 2 == np.zeros((2, 1)))
    ids, real = torch.arange(12).view(2, 6), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    batch = Batch((0, 1), ids, real, torch.tensor([[False] * 3 + [True] * 3, [False] * 4 + [False] * 2]))
    found = energies_of(loaded, kept, repairs[0], [batch])
    seen: dict[str, list[torch.Tensor]] = {"o_proj": [], "down_proj": []}
    with masked(loaded, kept, repairs[0]), torch.inference_mode():
        handles = [
            module(layer).register_forward_hook(lambda _m, args, _out, name=name: seen[name].append(args[0]))
            for name, module in (("o_proj", o_proj), ("down_proj", down_proj))
            for layer in loaded.layers
        ]
        streams = []
        handles += [layer.register_forward_hook(lambda _m, _a, out: streams.append(out)) for layer in loaded.layers]
        loaded.model.model(input_ids=ids, attention_mask=real, use_cache=False)
        for handle in handles:
            handle.remove()
    (weights,) = position_weights([batch])
    for layer, stream in enumerate(streams):
        stream = stream[0] if isinstance(stream, tuple) else stream
        share = (weights * real / stream.square().sum(-1))[..., None]
        for sums, inputs in ((found.o_proj, seen["o_proj"]), (found.down, seen["down_proj"])):
            expected = (inputs[layer].square() * share).sum((0, 1))
            torch.testing.assert_close(sums[layer], expected, rtol=1e-5, atol=0.0)
    assert not found.o_proj[0][2 * g.head_dim :].any() and found.down[0][::2].all(), "gates count"


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_matrix_is_the_sum_rounded_once_as_torch_rounds(dtype):
    rng = np.random.default_rng(1)
    matrix, scales = torch.from_numpy(rng.normal(size=(9, 7))).to(STORED_DTYPES[dtype]), torch.rand(2)
    prefix = words_of(matrix.double().numpy(), dtype)
    assert torch.equal(as_tensor(prefix, dtype), matrix), "words and numbers are the same"
    outputs, inputs = (
        torch.from_numpy(rng.integers(-127, 128, size=shape)).to(torch.int8) for shape in ((9, 2), (2, 7))
    )
    found = as_tensor(refitted(prefix, LowRank(outputs.numpy(), inputs.numpy(), scales.numpy()), dtype), dtype)
    exact = matrix.double() + outputs.double() @ (inputs.double() * scales.double()[:, None])
    assert torch.equal(found, exact.to(STORED_DTYPES[dtype]))


def test_factors_of_one_byte_miss_a_ten_thousandth():
    """Rows of very different sizes, one whose scale is below what 16 bits hold, and one of zeros included."""
    rng = np.random.default_rng(2)
    outputs, inputs = rng.normal(size=(50, 4)), rng.normal(size=(4, 90)) * np.array([[10.0], [1.0], [1e-8], [0.0]])
    found = low_rank(outputs, inputs)
    assert found.outputs.dtype == found.inputs.dtype == np.int8 and found.rank == 4
    again = difference(found)
    for one in range(4):
        exact = np.outer(outputs[:, one], inputs[one])
        missed = np.square(exact - np.outer(again[0][:, one], again[1][one])).sum()
        assert missed <= 3e-4 * np.square(exact).sum()


def test_half_a_difference_is_refused():
    with pytest.raises(ArtifactError, match="lora_A"):
        from_file({"a.lora_B.weight": None}, lambda _: np.zeros(1, np.uint8))
    with pytest.raises(ArtifactError, match="lora_scale"):
        from_file({"a.lora_B.weight": None, "a.lora_A.weight": None}, lambda _: np.zeros(1, np.uint8))
