"""Budget and layouts: a hard bound, nested masks, and the arithmetic of the mixture."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sspcompile.errors import ArtifactError, BudgetError
from sspcompile.select.budget import WHITELIST_SHARE, keep_from_strength, merit, order_of_merit
from sspcompile.select.mixture import breadth_of
from sspcompile.slicing.layouts import choose
from sspcompile.slicing.mask import HeadMask, check_mask, dump_mask, kept_of, load_mask, parse_mask


@st.composite
def problems(draw):
    layers, groups, size = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    shape = (layers, groups * size)
    scores = draw(hnp.arrays(np.float64, shape, elements=st.floats(0, 1, width=32)))
    return scores, groups


layouts = st.sampled_from(["uniform", "per-layer"])


@given(problems(), st.floats(0.01, 1.0), layouts)
def test_keep_ratio_is_a_hard_bound(problem, keep, layout):
    scores, groups = problem
    try:
        choice = choose(scores, groups, keep, layout)
    except BudgetError:
        assert int(np.floor(keep * scores.size + 1e-9)) < len(scores)
        return
    assert choice.kept.sum() <= keep * scores.size + 1e-9
    assert (choice.kept.sum(1) >= 1).all()


@given(problems(), st.floats(0.2, 1.0), st.floats(0.2, 1.0))
def test_more_keeping_never_drops_a_head_that_less_keeping_kept_per_layer(problem, one, other):
    scores, groups = problem
    low, high = sorted((max(one, 1 / scores.shape[1]), max(other, 1 / scores.shape[1])))
    small = choose(scores, groups, low, "per-layer").kept
    large = choose(scores, groups, high, "per-layer").kept
    assert (small <= large).all()


@given(problems(), st.floats(0.2, 1.0))
def test_no_other_uniform_mask_inside_the_bound_keeps_more_merit(problem, keep):
    scores, groups = problem
    heads, layers = scores.shape[1], len(scores)
    keep = max(keep, 1 / heads)
    best = scores[choose(scores, groups, keep, "uniform").kept].sum()
    grouped = -np.sort(-scores.reshape(layers, groups, -1), axis=-1)
    for g in range(1, groups + 1):
        for r in range(1, heads // groups + 1):
            if g * r * layers <= np.floor(keep * scores.size + 1e-9):
                inside = -np.sort(-grouped[..., :r].sum(-1), axis=-1)[:, :g]
                assert inside.sum() <= best * (1 + 1e-9) + 1e-12


def test_a_uniform_cut_of_equal_heads_uses_the_whole_budget_and_drops_groups_first():
    assert choose(np.ones((3, 8)), 4, 0.5, "uniform").shapes == ((2, 2),) * 3
    assert choose(np.ones((3, 8)), 4, 0.75, "uniform").shapes == ((3, 2),) * 3


@given(problems(), st.floats(0.2, 1.0), layouts)
def test_every_group_that_stays_keeps_the_same_number_of_heads(problem, keep, layout):
    scores, groups = problem
    kept = choose(scores, groups, max(keep, 1 / scores.shape[1]), layout).kept
    counts = kept.reshape(len(kept), groups, -1).sum(-1)
    for row in counts:
        assert len(set(row[row > 0])) == 1
    if layout == "uniform":
        assert len({tuple(sorted(row)) for row in counts.tolist()}) == 1


@given(problems(), st.floats(0.01, 1.0), st.floats(0.01, 1.0), layouts)
def test_whole_groups_are_kept_within_the_bound_and_nested_in_the_budget(problem, one, other, layout):
    scores, groups = problem
    size = scores.shape[1] // groups
    low, high = sorted((max(one, 1 / groups), max(other, 1 / groups)))
    small, large = (choose(scores, groups, keep, layout, groups_only=True) for keep in (low, high))
    assert (small.kept <= large.kept).all()
    for choice, keep in ((small, low), (large, high)):
        counts = choice.kept.reshape(len(scores), groups, size).sum(-1)
        assert set(np.unique(counts)) <= {0, size} and (counts.max(1) == size).all()
        assert choice.kept.sum() <= keep * scores.size + 1e-9
        assert choice.shapes == tuple((int((row > 0).sum()), size) for row in counts)


def test_the_best_groups_are_kept_whole():
    # sums of the groups: 3 and 4 in the first layer, 2 and 9 in the second; three of the four fit
    scores = np.array([[3.0, 0, 2, 2], [1, 1, 9, 0]])
    kept = choose(scores, 2, 0.75, "per-layer", groups_only=True).kept
    assert kept.astype(int).tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    # both layers alike: one group each, the better one
    kept = choose(scores, 2, 0.75, "uniform", groups_only=True).kept
    assert kept.astype(int).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]


def test_budget_below_one_group_per_layer_names_the_nearest_feasible_ratio():
    with pytest.raises(BudgetError, match=r"one group of 2\. The nearest feasible value is --keep 0\.25"):
        choose(np.ones((4, 8)), 4, 0.2, "per-layer", groups_only=True)
    choose(np.ones((4, 8)), 4, 0.25, "per-layer", groups_only=True)


def test_everything_is_kept_at_keep_one():
    assert choose(np.random.default_rng(0).random((4, 8)), 4, 1.0, "uniform").kept.all()
    assert choose(np.random.default_rng(0).random((4, 8)), 4, 1.0, "per-layer").kept.all()


def test_per_layer_layout_gives_the_heads_to_the_layer_that_needs_them():
    scores = np.full((4, 8), 0.01)
    scores[0] = 1.0
    kept = choose(scores, 8, 0.5, "per-layer").kept
    assert kept[0].all()
    assert kept.sum() == 16


def test_a_head_that_matters_is_not_lost_with_its_poor_group():
    scores = np.zeros((1, 8))
    scores[0, 5] = 1.0
    assert choose(scores, 4, 0.125, "per-layer").kept.nonzero()[1].tolist() == [5]


def test_budget_below_the_floor_names_the_nearest_feasible_ratio():
    with pytest.raises(BudgetError, match=r"nearest feasible value is --keep 0\.125"):
        choose(np.ones((4, 8)), 4, 0.1, "uniform")
    choose(np.ones((4, 8)), 4, 0.125, "uniform")


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_more_strength_never_keeps_more_and_a_narrower_scenario_never_keeps_more(one, other, breadth):
    low, high = sorted((one, other))
    assert keep_from_strength(high, breadth) <= keep_from_strength(low, breadth)
    assert keep_from_strength(breadth, low) <= keep_from_strength(breadth, high)
    assert 0 < keep_from_strength(1.0, 0.0) <= keep_from_strength(0.0, 1.0) == 1


@given(problems(), st.integers(0, 2**32 - 1))
def test_whitelist_takes_at_most_its_share_of_any_budget_by_privilege(problem, seed):
    scores, _ = problem
    white = np.random.default_rng(seed).random(scores.shape) < 0.4
    order = order_of_merit(scores, white)
    assert sorted(order.tolist()) == list(range(scores.size))
    by_score = np.argsort(-scores.ravel(), kind="stable")
    for size in range(1, scores.size + 1):
        own_merit = set(by_score[:size].tolist())
        privileged = [h for h in order[:size] if h not in own_merit]
        assert len(privileged) <= WHITELIST_SHARE * size + 1


def test_without_a_whitelist_merit_is_the_score():
    scores = np.random.default_rng(1).random((3, 6))
    assert np.allclose(merit(scores, np.zeros_like(scores, dtype=bool)), scores)


def test_breadth_is_zero_for_one_domain_and_one_for_all_alike():
    assert breadth_of(np.array([1.0, 0, 0])) == 0
    assert breadth_of(np.full(6, 1 / 6)) == pytest.approx(1)


def make_mask(**changes) -> HeadMask:
    values = {
        "model": "f",
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "kept": ((0, 1), (2, 3)),
        "layout": "uniform",
        "keep_requested": 0.5,
        "keep_achieved": 0.5,
        "scores": ((0.1,) * 4,) * 2,
        "whitelist": ((0, 1),),
        "criterion": "fisher",
        "scenario": {"name": "x"},
    }
    return HeadMask(**{**values, **changes})


def test_mask_file_round_trips(tmp_path):
    mask = make_mask()
    (tmp_path / "mask.json").write_text(dump_mask(mask))
    assert load_mask(tmp_path / "mask.json") == mask
    assert kept_of(mask.as_array()) == mask.kept


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"kept": ((0, 1), (2, 4))}, "out of range"),
        ({"kept": ((0, 1), (3, 2))}, "unsorted"),
        ({"kept": ((0, 1), (2, 2))}, "double"),
        ({"kept": ((0, 1), ())}, "keeps no head"),
        ({"kept": ((0, 1, 2), (2, 3))}, "different numbers"),
        ({"kept": ((0, 1), (0, 2))}, "same numbers in every layer"),
        ({"kept": ((0, 1),)}, "1 rows for 2 layers"),
        ({"scores": ()}, "scores"),
        ({"scores": ((0.1,) * 4,)}, "scores"),
        ({"scores": ((0.1,) * 4, (0.1,) * 3)}, "scores"),
        ({"whitelist": ((2, 0),)}, "whitelist"),
        ({"whitelist": ((0, 4),)}, "whitelist"),
        ({"whitelist": ((-1, 0),)}, "whitelist"),
        ({"memory_requested": {"a": 1}}, "memory_requested is not bytes, batch and context"),
        ({"memory_requested": {"bytes": 1, "batch": 0, "context": 1}}, "memory_requested"),
        ({"latency_requested": {}}, "latency_requested is not nanoseconds, batch and context"),
        ({"latency_requested": {"bytes": 1, "batch": 1, "context": 1}}, "latency_requested"),
        ({"experts": 0}, "0 experts"),
        ({"experts": 2}, "2 experts and no channels"),
        ({"intermediate": -1}, "-1 channels"),
    ],
)
def test_impossible_masks_are_refused(changes, problem):
    with pytest.raises(ArtifactError, match=problem):
        check_mask(make_mask(**changes))


@pytest.mark.parametrize("key", ["chanels", "removd", "Kept", "x" * 500])
def test_a_misspelt_key_of_a_mask_is_named_instead_of_left_out(key):
    text = json.dumps({**json.loads(dump_mask(make_mask())), key: []})
    with pytest.raises(ArtifactError, match=f"{key[:60]}.*Known: channels, criterion") as caught:
        parse_mask(text)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({"channels": ((0,), (1,)), "intermediate": 2}, 2),
        ({"removed": (1,), "kept": ((0, 1), ())}, 3),
        ({"layout": "per-layer", "kept": ((0, 1), ())}, 4),
        ({"channels": ((0, 2), (1, 3)), "intermediate": 2, "experts": 2}, 5),
    ],
)
def test_a_mask_that_says_an_older_version_than_what_it_holds_is_refused(changes, needed):
    """Readers of that older version would take it for another mask."""
    mask = make_mask(**changes)
    written = json.loads(dump_mask(mask))
    assert written["schema_version"] == needed and parse_mask(json.dumps(written)) == mask
    for version in range(1, needed):
        with pytest.raises(ArtifactError, match=f"version {version} and holds.*Set schema_version to {needed}"):
            parse_mask(json.dumps({**written, "schema_version": version}))
    for version in ("2", True, 2.0, None, [2]):
        with pytest.raises(ArtifactError):
            parse_mask(json.dumps({**written, "schema_version": version}))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 1, "layers": "two"}', "\x00"])
def test_damaged_mask_files_are_refused_in_one_line(tmp_path, text):
    (tmp_path / "mask.json").write_text(text)
    with pytest.raises(ArtifactError) as caught:
        load_mask(tmp_path / "mask.json")
    assert "\n" not in str(caught.value)
