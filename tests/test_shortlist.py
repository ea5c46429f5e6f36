"""The masks of a default build: several rankings, every shape of a uniform one, the best by measuring."""

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
from sspcompile.progress import no_steps
from sspcompile.request.options import Options
from sspcompile.request.splits import Splits
from sspcompile.select.judging import Judge
from sspcompile.select.scoring import Ranking, measured_rankings
from sspcompile.select.search import best_of, masks_of
from sspcompile.select.texts import Texts
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
    options = Options(max_tokens=32, continuation_tokens=4)
    splits = Splits(texts[:20], texts[20:], (), (), 20, 8, 0)
    return Judge(loaded, splits, options, Texts(loaded, options), dtype=torch.float32)


NOBODY = np.zeros((3, 8), dtype=bool)


def ranked(judge: Judge, seed: int) -> tuple[Ranking, ...]:
    mine = Ranking("mine", np.random.default_rng(seed).random((3, 8)))
    return (mine, *measured_rankings(judge.loaded, judge.sentences, 0, "head", no_steps))


def test_winner_of_every_layout_has_the_least_divergence_of_all_that_were_tried(judge):
    rankings = ranked(judge, 0)
    assert [ranking.name for ranking in rankings] == ["mine", "obs", "fisher"]
    masks = {layout: masks_of(rankings, layout, NOBODY, 0.5, 4) for layout in ("uniform", "per-layer")}
    found = best_of(judge, masks)
    for layout, shapes in (("uniform", {(4, 1), (2, 2)}), ("per-layer", {None})):
        tried = found[layout].tried
        values = [one.distance for one in tried]
        assert values == sorted(values) and len(tried) == len(masks[layout]) >= 2
        assert {one.shape for one in tried} == shapes
        assert found[layout].ranking.name == tried[0].criterion and found[layout].repair is not None
        # The winner by itself comes to the same distance.
        pair = masks_of([found[layout].ranking], layout, NOBODY, 0.5, 4)
        alone = best_of(judge, {layout: [*pair, *masks[layout]]})
        assert alone[layout].tried[0].distance == pytest.approx(values[0], rel=1e-4)


def test_a_mask_that_is_the_same_by_two_rankings_is_measured_once_and_is_the_earlier_ones():
    values = np.random.default_rng(0).random((3, 8))
    masks = masks_of([Ranking("mine", values), Ranking("twin", values)], "uniform", NOBODY, 0.5, 4)
    assert {ranking.name for ranking, _ in masks} == {"mine"}


def test_masks_per_layer_are_those_of_the_rankings(judge):
    rankings = ranked(judge, 1)
    for ranking, choice in masks_of(rankings, "per-layer", NOBODY, 0.5, 4):
        np.testing.assert_array_equal(choice.kept, choose(ranking.values, 4, 0.5, "per-layer").kept)


def test_a_shape_that_no_class_holds_is_left_out():
    mine = [Ranking("mine", np.random.default_rng(0).random((3, 8)))]
    masks = masks_of(mine, "uniform", NOBODY, 0.5, 4, holds=lambda choice: choice.shapes[0] != (4, 1))
    assert {choice.shapes[0] for _, choice in masks} == {(2, 2)}
    assert not masks_of(mine, "uniform", NOBODY, 0.5, 4, holds=lambda _: False)


@pytest.mark.whole
def test_default_build_records_what_it_tried_and_a_named_criterion_tries_nothing(tmp_path):
    make_checkpoint(tmp_path / "model", Shape(layers=2, hidden=64, kv_heads=4, group_size=2, head_dim=16))
    build = (
        "build",
        "--scenario",
        "chemistry-helpdesk",
        "--model",
        "model",
        "--keep",
        "0.5",
        "--layout",
        "uniform",
        "-q",
    )
    fast = ("--continuation-tokens", "2", "--max-tokens", "32")
    masks = []
    for more in (("--out", "auto"), ("--out", "named", "--criterion", "fisher-rounds")):
        command = [sys.executable, "-m", "sspcompile.cli.main", *build, *fast, *more]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        masks.append(json.loads((tmp_path / more[1] / "mask.json").read_text()))
    tried = masks[0]["scenario"]["tried"]
    assert masks[0]["criterion"] == tried[0]["criterion"] == "obs" and len(tried) == 2
    assert min(one["distance"] for one in tried) == tried[0]["distance"]
    assert masks[1]["criterion"] == "fisher-rounds" and "tried" not in masks[1]["scenario"]
    assert Path(tmp_path / "auto" / "model" / "config.json").is_file()
