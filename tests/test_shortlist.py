"""The masks of a default build: several rankings, every shape of a uniform one, the best by cross-fitting."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import Shape, make_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from sspcompile.errors import BudgetError
from sspcompile.model.loading import load
from sspcompile.request.options import Options
from sspcompile.request.splits import Splits
from sspcompile.select.judging import Judge
from sspcompile.select.reading import Ranking
from sspcompile.select.search import MEASURED_SCORES, WITHIN_LAYERS, Folds, best_mask, rankings
from sspcompile.slicing.layouts import choose, uniform_choices

grids = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 1000))


@given(grid=grids, keep=st.floats(0.05, 1.0), groups_only=st.booleans())
def test_uniform_choices_are_the_widest_shapes_within_the_budget(grid, keep, groups_only):
    layers, groups, size, seed = grid
    merit = np.random.default_rng(seed).random((layers, groups * size))
    smallest = (size if groups_only else 1) / (groups * size)
    if keep * layers * groups * size + 1e-9 < layers * groups * size * smallest:
        with pytest.raises(BudgetError):
            uniform_choices(merit, groups, keep, groups_only=groups_only)
        return
    found = uniform_choices(merit, groups, keep, groups_only=groups_only)
    shapes = [choice.shapes[0] for choice in found]
    assert choose(merit, groups, keep, "uniform", groups_only=groups_only).shapes[0] in shapes
    assert len(set(shapes)) == len(shapes)
    for choice, (g, r) in zip(found, shapes, strict=True):
        assert choice.ratio <= keep + 1e-9 and set(choice.shapes) == {(g, r)}
        kept = choice.kept.reshape(layers, groups, size)
        assert (kept.any(-1).sum(-1) == g).all() and set(kept.sum(-1).ravel()) <= {0, r}
        assert not any(other != (g, r) and other[0] >= g and other[1] >= r for other in shapes)


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Judge:
    shape = Shape(layers=3, hidden=64, kv_heads=4, group_size=2, head_dim=16)
    loaded = load(make_checkpoint(tmp_path_factory.mktemp("model"), shape), fingerprint="")
    texts = tuple(f"What is {n} plus {n + 1}?" for n in range(28))
    return Judge(
        loaded,
        Splits(texts[:20], texts[20:], (), (), 20, 8, 0),
        Options(max_tokens=32, continuation_tokens=4),
        dtype=torch.float32,
        progress=lambda *_: None,
    )


def test_winner_has_the_least_divergence_of_all_that_were_tried(judge):
    rng = np.random.default_rng(0)
    ranked = rankings(judge, Ranking("mine", rng.random((3, 8))), ("per-layer", "uniform"))
    assert [ranking.name for ranking in ranked] == ["mine", *MEASURED_SCORES, *WITHIN_LAYERS]
    found = best_mask(judge, ranked, "uniform", np.zeros((3, 8), dtype=bool), 0.5)
    values = [one.distance for one in found.tried]
    assert values == sorted(values) and len(found.tried) >= 3
    assert {one.shape for one in found.tried} == {(4, 1), (2, 2)}
    assert Folds(judge).distances([found.choice.kept]) == values[:1] and found.ranking.name == found.tried[0].criterion
    # A mask that is the same by two rankings is measured once, and is the earlier one's.
    twins = [ranked[0], Ranking("twin", ranked[0].values)]
    again = best_mask(judge, twins, "uniform", np.zeros((3, 8), dtype=bool), 0.5)
    assert {one.criterion for one in again.tried} == {"mine"}


def test_scores_of_single_layers_take_no_part_where_layers_share_a_budget(judge):
    rng = np.random.default_rng(1)
    ranked = rankings(judge, Ranking("mine", rng.random((3, 8))), ("per-layer",))
    assert [ranking.name for ranking in ranked] == ["mine", *MEASURED_SCORES]
    ranked = (*ranked, Ranking(WITHIN_LAYERS[0], rng.random((3, 8))))
    found = best_mask(judge, ranked, "per-layer", np.zeros((3, 8), dtype=bool), 0.5)
    assert {one.criterion for one in found.tried} == {"mine", *MEASURED_SCORES}
    assert {one.shape for one in found.tried} == {None}
    best = next(ranking for ranking in ranked if ranking.name == found.tried[0].criterion)
    np.testing.assert_array_equal(found.choice.kept, choose(best.values, 4, 0.5, "per-layer").kept)


def test_a_shape_that_no_class_holds_is_left_out(judge):
    ranked = [Ranking("mine", np.random.default_rng(0).random((3, 8)))]
    nobody = np.zeros((3, 8), dtype=bool)
    found = best_mask(judge, ranked, "uniform", nobody, 0.5, holds=lambda choice: choice.shapes[0] != (4, 1))
    assert {one.shape for one in found.tried} == {(2, 2)}
    assert best_mask(judge, ranked, "uniform", nobody, 0.5, holds=lambda _: False) is None


def test_default_build_records_what_it_tried_and_a_named_criterion_tries_nothing(tmp_path):
    make_checkpoint(tmp_path / "model", Shape(layers=2, hidden=64, kv_heads=4, group_size=2, head_dim=16))
    build = ("build", "--scenario", "chemistry-helpdesk", "--model", "model", "--layout", "uniform", "-q")
    fast = ("--continuation-tokens", "2", "--max-tokens", "32")
    masks = []
    for more in (("--out", "auto"), ("--out", "named", "--criterion", "fisher-rounds")):
        command = [sys.executable, "-m", "sspcompile.cli.main", *build, *fast, *more]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        masks.append(json.loads((tmp_path / more[1] / "mask.json").read_text()))
    tried = masks[0]["scenario"]["tried"]
    assert masks[0]["criterion"] == tried[0]["criterion"] and len(tried) >= 3
    assert min(one["distance"] for one in tried) == tried[0]["distance"]
    assert masks[1]["criterion"] == "fisher-rounds" and "tried" not in masks[1]["scenario"]
    assert Path(tmp_path / "auto" / "model" / "config.json").is_file()
