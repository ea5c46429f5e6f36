"""The budget as a bound on the loss: the smallest mask within it, found by measuring a few."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from builders import Shape, make_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from sspcompile.errors import BudgetError
from sspcompile.intervals import Estimate, share_estimate
from sspcompile.report.json import read_report
from sspcompile.request.options import DEFAULT_MAX_LOSS, Options
from sspcompile.select.allowed import Allowed, Rung
from sspcompile.select.descent import AT_ONCE, LEAST_RATIO, ROUNDS, USUAL_ROUNDS, _Bracket, close, descend
from sspcompile.select.floor import Floor, nothing_within
from sspcompile.slicing.layouts import Choice, choose

LAYERS, HEADS = 8, 8
MERIT = np.random.default_rng(0).random((LAYERS, HEADS))


def choice_of(share: float) -> Choice:
    return choose(MERIT, HEADS, share, "per-layer")


def walk(loss_at, max_loss: float) -> tuple[Floor, list[float]]:
    asked: list[float] = []

    def measure(choices, number):
        asked.extend(choice.ratio for choice in choices)
        return [Rung(choice.ratio, Estimate(loss_at(choice.ratio))) for choice in choices]

    allowed = Allowed(max_loss)
    tried, keep, failed = descend(choice_of, measure, lambda choice: choice.ratio, 1 / HEADS, allowed)
    if keep is None:
        raise nothing_within(allowed, tried, "heads")
    return Floor(max_loss, keep, failed, tried), asked


@given(edge=st.floats(0.15, 0.95), slope=st.floats(0.1, 5.0))
def test_what_is_found_lies_close_to_where_the_loss_begins_to_be_too_large(edge, slope):
    """Of a loss that falls with what is kept, however it does, the smallest share within the bound is known to a few
    heads.
    """
    found, asked = walk(lambda kept: 0.05 + slope * (edge - kept), 0.05)
    # Two heads, and what four rounds leave of a loss that is no power of what goes.
    assert edge <= found.keep <= edge + 2 / (LAYERS * HEADS)
    assert found.failed < edge and len(asked) == len(set(asked)) <= ROUNDS * AT_ONCE
    assert [one.kept for one in found.tried] == sorted(asked)


@given(gone=st.floats(0.002, 0.24), power=st.floats(0.5, 1.2))
def test_a_loss_that_is_a_power_of_what_goes_is_found_in_few_rounds(gone, power):
    """As of real models; the masks are as fine as those of parameters."""
    asked: list[int] = []

    def measure(choices, number):
        asked.append(number)
        return [Rung(kept, Estimate(0.05 * ((1 - kept) / gone) ** power)) for kept in choices]

    tried, keep, failed = descend(float, measure, float, 0.2, Allowed(0.05), unit="parameters")
    assert keep is not None and failed - 1e-9 < 1 - gone < keep + 1e-9 and keep - failed <= close(keep) + 1e-9
    rounds = USUAL_ROUNDS if gone < 0.1 else ROUNDS
    assert len(asked) <= rounds and len(tried) <= (9 if gone < 0.1 else 10)


@given(most=st.floats(0.3, 0.99), gone=st.floats(0.05, 0.6), power=st.floats(0.5, 1.2))
def test_beside_another_bound_the_first_round_measures_as_many_masks_as_any(most, gone, power):
    """All of the shares that are tried first may lie above it, and a round costs the dense passes of three masks."""
    rounds: list[int] = []

    def measure(choices, number):
        rounds.append(len(choices))
        return [Rung(kept, Estimate(0.05 * ((1 - kept) / gone) ** power)) for kept in choices]

    tried, keep, _ = descend(
        lambda share: min(share, most), measure, float, 0.2, Allowed(0.05), unit="parameters", bounded=True
    )
    assert rounds[0] == AT_ONCE and max(one.kept for one in tried) == most
    assert (keep is None) == (0.05 * ((1 - most) / gone) ** power > 0.05)
    assert keep is None or keep >= 1 - gone - 1e-9


@pytest.mark.parametrize("units", [2, 3, 8])
@pytest.mark.parametrize("edge", [0.2, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("bound", [0.05, 0.0])
def test_of_whole_layers_each_is_measured_once_and_the_walk_ends(units, edge, bound):
    """Many shares give the same mask, and a bound of nothing has no multiples."""
    seen: list[float] = []

    def measure(choices, number):
        seen.extend(choices)
        return [Rung(kept, Estimate(0.0 if kept >= edge else bound + 0.01)) for kept in choices]

    allowed = Allowed(bound)
    _, keep, failed = descend(lambda share: round(share * units) / units, measure, float, 1 / units, allowed)
    assert len(seen) == len({*seen}) and failed < (keep or 1.0)
    assert keep is None or keep >= edge
    if keep is not None:
        assert keep - failed <= 1 / units + 1e-9 or keep - 1 / units < 1 / units + 1e-9, "the next smaller one failed"


@given(least=st.floats(0.9, 0.98))
def test_where_more_than_the_first_shares_must_stay_the_walk_begins_there(least):
    """A vocabulary may be more of a small model than any of the shares that are tried first leaves."""
    asked: list[float] = []

    def measure(choices, number):
        asked.extend(choice.ratio for choice in choices)
        return [Rung(choice.ratio, Estimate(0.0)) for choice in choices]

    _, keep, _ = descend(choice_of, measure, lambda choice: choice.ratio, least, Allowed(0.05))
    assert keep and asked and least - 1 / (LAYERS * HEADS) <= keep < 1 and min(asked) >= least - 1 / (LAYERS * HEADS)


@given(seed=st.integers(0, 10_000))
def test_a_lucky_mask_below_one_that_failed_is_not_taken(seed):
    losses = np.random.default_rng(seed).random(LAYERS * HEADS + 1)
    try:
        found, _ = walk(lambda kept: float(losses[round(kept * LAYERS * HEADS)]), 0.5)
    except BudgetError:
        return
    # Isotonic regression by its definition: of each mask the largest of the least means of runs that hold it.
    row = [max(one.loss.value, 0.5 * LEAST_RATIO) for one in sorted(found.tried, key=lambda one: -one.kept)]
    rising = [
        max(min(np.mean(row[start : end + 1]) for end in range(place, len(row))) for start in range(place + 1))
        for place in range(len(row))
    ]
    kept = sorted((one.kept for one in found.tried), reverse=True)
    assert found.keep == min(share for share, loss in zip(kept, rising, strict=True) if loss <= 0.5)
    assert next(one for one in found.tried if one.kept == found.keep).loss.value <= 0.5


def test_one_unlucky_mask_does_not_rule_out_all_below_it_and_one_lucky_mask_is_not_taken():
    def kept(*losses: float) -> float | None:
        rungs = [Rung(1 - 0.01 * place, Estimate(loss)) for place, loss in enumerate(losses, 1)]
        return _Bracket.of(rungs, Allowed(0.05)).keep

    assert kept(0.03, 0.051, 0.048, 0.04, 0.09) == 0.96
    assert kept(0.03, 0.06, 0.07, 0.04, 0.09) == 0.99
    assert kept(0.06, 0.07) is None
    better = [of_replies(share, times) for share, times in ((0.95, 1.03), (0.88, 1.03), (0.75, 0.93))]
    assert _Bracket.of(better, Allowed(None, {}, 1.01)).keep is None, "better than the dense model makes up for nothing"


def test_no_hint_names_a_bound_that_the_option_refuses():
    for most, hint in ((40.0, "Give --max-perplexity 40, or a --size."), (1e13, "Give a --size.")):
        error = nothing_within(Allowed(None, {}, 1.05), (of_replies(0.5, most),), "parameters")
        assert error.hint == hint
    every = Rung(0.5, Estimate(0.9, 0.8, 1.0), (), Estimate(2.0))
    assert nothing_within(Allowed(0.05, {}, 1.05), (every,), "parameters").hint == "Give a --size."


def test_where_nothing_is_within_the_bound_the_nearest_is_named():
    with pytest.raises(
        BudgetError, match=r"at most 1 % of the next tokens: the nearest, 9\d.\d % of the heads, changes 6"
    ):
        walk(lambda kept: 0.06 + 0.1 * (1 - kept), 0.01)
    assert walk(lambda kept: 0.0, 0.01)[0].failed == 0.0


def test_refitted_to_all_texts_a_mask_that_is_over_the_bound_gives_way_to_the_next_larger():
    rungs = ((0.4, Estimate(0.03)), (0.5, Estimate(0.01)), (0.6, Estimate(0.03)), (0.7, Estimate(0.005)))
    floor = Floor(0.02, 0.5, 0.4, tuple(Rung(*pair) for pair in rungs))
    assert floor.larger(0.5) == 0.7
    assert floor.larger(0.7) is None


def test_the_default_bounds_the_loss_and_any_other_budget_takes_its_place():
    assert Options().max_loss == DEFAULT_MAX_LOSS and Options().keep is Options().strength is Options().size is None
    for other in ({"keep": 0.5}, {"strength": 0.5}, {"size": 0.8}):
        assert Options(**other).max_loss is None
    assert Options(max_loss=0.1).keep is None
    with pytest.raises(ValueError, match="keep and max_loss exclude each other"):
        Options(keep=0.5, max_loss=0.1)


FAST = ("--continuation-tokens", "4", "--max-tokens", "48", "--baselines", "none", "--quiet")


def test_a_build_without_a_budget_stays_within_the_bound_where_it_decides_and_says_what_it_tried(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    code, _, err = run("build", "--scenario", "A helpdesk for questions about chemistry", "--out", "cut", *FAST)
    assert code == 0, err
    report, mask = (
        read_report(tmp_path / "cut" / "report.json"),
        json.loads((tmp_path / "cut" / "mask.json").read_text()),
    )
    floor = mask["scenario"]["floor"]
    assert report.budget.max_loss == floor["max_loss"] == DEFAULT_MAX_LOSS
    tried = [(one["kept"], one["loss"]["value"], one["loss"]["high"]) for one in floor["tried"]]
    assert [(*pair, most) for pair, most in zip(report.budget.measured, report.budget.at_most, strict=True)] == tried
    plan = json.loads((tmp_path / "cut" / "plan.json").read_text())
    left = plan["parameters"]["sliced"] / plan["parameters"]["dense"]
    assert floor["unit"] == "parameters" and mask["size_requested"] == floor["keep"]
    assert floor["keep"] - 0.03 < left <= floor["keep"] < 1 and floor["failed"] < floor["keep"]
    assert len(set(plan["widths"])) > 1
    at = next(one for one in floor["tried"] if one["kept"] == floor["keep"])
    assert at["loss"]["value"] == 0 or at["loss"]["value"] <= at["loss"]["high"] <= DEFAULT_MAX_LOSS
    assert "The smallest mask within a loss of 5 %" in (tmp_path / "cut" / "report.md").read_text()
    assert "asked for: at most 5% of the next tokens changed\n" in run("inspect", "cut")[1], "and no size"


@pytest.mark.whole
def test_where_heads_alone_may_go_the_bound_is_kept_by_heads(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    wanted = ("--scenario", "A helpdesk for questions about chemistry", "--units", "heads", "--out", "cut")
    code, _, err = run("build", *wanted, *FAST)
    assert code == 0, err
    mask, plan = (json.loads((tmp_path / "cut" / name).read_text()) for name in ("mask.json", "plan.json"))
    floor = mask["scenario"]["floor"]
    assert floor["unit"] == "heads" and mask["channels"] is None and mask["size_requested"] is None
    assert 0 < mask["keep_achieved"] <= floor["keep"] < 1 and len(set(plan["widths"])) == 1
    # What changes nothing is within the bound however few the tokens are.
    losses = {one["kept"]: one["loss"] for one in floor["tried"]}
    held = [kept for kept, loss in losses.items() if loss["value"] == 0 or loss["high"] <= DEFAULT_MAX_LOSS]
    assert floor["failed"] < floor["keep"] in held


def test_a_bound_that_no_mask_holds_writes_nothing(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_checkpoint(tmp_path / "model", Shape(layers=2, hidden=64, kv_heads=4, group_size=1, head_dim=16))
    (tmp_path / "asked.txt").write_text("\n".join(f"What is {n} plus {3 * n + 1}?" for n in range(48)))
    monkeypatch.chdir(tmp_path)
    wanted = ("--model", "model", "--max-loss", "0.0001", "--repair", "none")
    code, _, err = run("build", "--scenario", "asked.txt", *wanted, "--out", "cut", *FAST)
    assert code == 3 and not (tmp_path / "cut").exists()
    assert "No mask changes at most 0.01 % of the next tokens" in err and "--max-loss 0." in err


def rung(share: float, loss: float, width: float) -> Rung:
    return Rung(share, Estimate(loss, loss - width, loss + width))


@given(edge=st.floats(0.3, 0.9), width=st.floats(0.001, 0.04))
def test_the_bound_is_for_the_upper_end_of_the_interval(edge, width):
    """A mask is taken where its loss, with what chance may hide of it, is within the bound."""

    def measure(choices, number):
        return [rung(choice.ratio, 0.05 - width + (edge - choice.ratio), width) for choice in choices]

    tried, keep, failed = descend(choice_of, measure, lambda choice: choice.ratio, 1 / HEADS, Allowed(0.05))
    assert keep is not None and failed < edge <= keep  # by the mean alone it would be `width` below that
    passed = {one.kept for one in tried if one.loss.most <= 0.05}
    assert keep == min(passed)


def test_the_error_names_both_ends_and_a_bound_that_would_do():
    error = nothing_within(Allowed(0.05), (rung(0.95, 0.0421, 0.02),), "parameters")
    assert "changes 4.2 % (6.2 % at most)" in error.message
    assert error.hint is not None and "--max-loss 0.063" in error.hint
    assert "More prompts of your own" in error.hint, "the interval alone is above the bound"
    more = nothing_within(Allowed(0.04), (rung(0.95, 0.0421, 0.02),), "parameters")
    assert more.hint is not None and "More prompts" not in more.hint
    law = Allowed(0.05, {"law": 0.03})
    spared = [Rung(0.95, Estimate(0.02), (rung(0.95, loss, 0.02).loss,)) for loss in (0.02, 0.04)]
    assert [law.by_chance(one) for one in spared] == [True, False]


def test_a_mask_that_changes_nothing_is_within_any_bound_and_one_that_changes_a_token_of_few_is_not():
    """Sixteen positions show no less than 19 %, even of the dense model itself."""
    nothing, one = (share_estimate([share] + [0.0] * 7, 16, seed=0) for share in (0.0, 0.5))
    assert Allowed(0.05).excess(Rung(0.9, nothing)) <= 0 < Allowed(0.05).excess(Rung(0.9, one))
    law = Allowed(None, {"law": 0.05})
    assert law.excess(Rung(0.9, one, (nothing,))) <= 0 < law.excess(Rung(0.9, nothing, (one,)))
    assert nothing.most > 0.05


def test_without_enough_texts_for_an_interval_the_loss_itself_is_bounded():
    assert Allowed(0.05).excess(Rung(0.9, Estimate(0.04))) < 0 < Allowed(0.05).excess(rung(0.9, 0.04, 0.02))


# Replies


def of_replies(share: float, perplexity: float, width: float = 0.0, loss: float = 0.2) -> Rung:
    return Rung(share, Estimate(loss), (), Estimate(perplexity, perplexity - width, perplexity + width))


def test_a_bound_on_the_perplexity_takes_the_place_of_the_default_and_stands_beside_one_on_the_loss():
    assert Options(max_perplexity=1.05).max_loss is None and Options(max_perplexity=1.05).floored
    both = Options(max_perplexity=1.05, max_loss=0.1, size=0.9)
    assert (both.max_perplexity, both.max_loss, both.size) == (1.05, 0.1, 0.9)
    assert not Options(size=0.9).floored
    for none in (1.0, 0.05, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="max_perplexity"):
            Options(max_perplexity=none)
    with pytest.raises(ValueError, match="keep and max_perplexity exclude each other"):
        Options(keep=0.5, max_perplexity=1.05)


@given(edge=st.floats(0.3, 0.9), width=st.floats(0.001, 0.04))
def test_the_bound_on_the_perplexity_is_for_the_upper_end_of_its_interval(edge, width):
    allowed = Allowed(None, {}, 1.05)

    def measure(choices, number):
        return [of_replies(one.ratio, 1.05 - width + (edge - one.ratio), width) for one in choices]

    tried, keep, failed = descend(choice_of, measure, lambda choice: choice.ratio, 1 / HEADS, allowed)
    assert keep is not None and failed < edge <= keep
    assert keep == min(one.kept for one in tried if one.perplexity is not None and one.perplexity.most <= 1.05)
    floor = Floor(None, keep, failed, tried, max_perplexity=1.05)
    assert floor.larger(keep) == min((one.kept for one in tried if one.kept > keep), default=None)


@given(loss=st.floats(0, 0.2), perplexity=st.floats(0.9, 1.3))
def test_of_several_bounds_all_hold(loss, perplexity):
    one = of_replies(0.9, perplexity, loss=loss)
    holds = loss <= 0.05 and perplexity <= 1.1
    assert (Allowed(0.05, {}, 1.1).excess(one) <= 0) is holds
    assert (Allowed(0.05, {}, 1.1).ratio(one) <= 1) is holds
    assert (Allowed(None, {}, 1.1).excess(one) <= 0) is (perplexity <= 1.1)
    assert (Allowed(0.05).excess(one) <= 0) is (loss <= 0.05)


def test_the_error_about_perplexity_names_both_ends_and_a_bound_that_would_do():
    error = nothing_within(Allowed(None, {}, 1.05), (of_replies(0.97, 1.041, 0.02),), "parameters")
    assert error.message == (
        "No mask has replies at most 1.05 times as perplexing: the nearest, 97.0 % of the parameters, has them 1.041 "
        "times (1.061 at most)."
    )
    assert error.hint is not None and error.hint.startswith("Give --max-perplexity 1.061, or a --size. More prompts")
    both = Allowed(0.05, {"law": 0.1}, 1.05)
    one = Rung(0.9, Estimate(0.02), (Estimate(0.2),), Estimate(1.2))
    error = nothing_within(both, (one,), "parameters")
    assert error.message == (
        "No mask has replies at most 1.05 times as perplexing and changes at most 5 % of the next tokens and 10 % of "
        "those of law: the nearest, 90.0 % of the parameters, has them 1.200 times and changes 2.0 % and 20.0 % of "
        "those of law."
    )
    assert error.hint is not None and "Give --max-perplexity 1.2 --protect law=0.2, or" in error.hint


def test_a_build_by_the_perplexity_of_replies_stays_within_it_where_it_decides_and_says_what_it_tried(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    wanted = ("--scenario", "A helpdesk for questions about chemistry", "--max-perplexity", "1.1", "--out", "cut")
    code, _, err = run("build", *wanted, *FAST)
    assert code == 0, err
    report, text = read_report(tmp_path / "cut" / "report.json"), (tmp_path / "cut" / "report.md").read_text()
    mask = json.loads((tmp_path / "cut" / "mask.json").read_text())
    floor, budget = mask["scenario"]["floor"], report.budget
    assert (floor["max_loss"], floor["max_perplexity"]) == (None, 1.1) == (budget.max_loss, budget.max_perplexity)
    ends = [(one["perplexity"]["value"], one["perplexity"]["high"]) for one in floor["tried"]]
    assert [*budget.perplexities] == ends and len(budget.measured) == len(ends)
    at = next(one for one in floor["tried"] if one["kept"] == floor["keep"])
    assert at["perplexity"]["high"] <= 1.1 and floor["failed"] < floor["keep"] < 1
    ours = next(row for row in report.quality if row.role == "ours")
    assert ours.reply_perplexity is not None and "eld-out replies have" in text
    assert "The smallest mask within 1.1 times the perplexity of replies" in text
    assert "perplexity of replies, times" in text
    assert "asked for: at most 1.1 times the perplexity of replies\n" in run("inspect", "cut")[1]
    said = run("plan", "--max-perplexity", "1.1")[2]
    assert "how much can go for --max-perplexity 1.1 is measured by `sspcompile build`" in said
