"""Which texts may choose and which may judge."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sspcompile.embedded import POOLS_DIR
from sspcompile.errors import ArtifactError, InputError
from sspcompile.intervals import Estimate, mean_estimate
from sspcompile.model.divergence import Divergence
from sspcompile.repair.repair import Repair
from sspcompile.request.conversations import is_of
from sspcompile.request.domains import DomainPool, load_outside, load_pools
from sspcompile.request.options import Options
from sspcompile.request.pools import pools_of, pools_suffix
from sspcompile.request.prompts import answered, bare
from sspcompile.request.splits import (
    FIT_PROMPTS,
    GUARD_PROMPTS,
    JUDGE_PROMPTS,
    OWN_CHOOSING,
    OWN_FIT_PROMPTS,
    OWN_GUARD_PROMPTS,
    OWN_JUDGE_PROMPTS,
    Holding,
    draw_splits,
    fit_part,
    seen,
    seen_part,
    split,
)
from sspcompile.select.judging import Candidate, decide
from sspcompile.select.mixture import Mixture
from sspcompile.slicing.layouts import Choice

NAMES = ("a", "b", "c")
POOLS = tuple(DomainPool(name, name, (), tuple(f"{name} {n}" for n in range(100))) for name in NAMES)


def mixture(*weights: float, unknown: float = 0.0) -> Mixture:
    return Mixture(NAMES, np.array(weights), 0.0, unknown)


@pytest.mark.parametrize("own", [0, 1, 3, 4, 20, 200, 5000])
def test_no_text_chooses_and_guards_or_judges(own):
    evidence = draw_splits([f"mine {n}" for n in range(own)], mixture(0.7, 0.3, 0.0).parts, POOLS, 0)
    parts = [set(evidence.fit), set(evidence.guard), set(evidence.judge), set(evidence.off)]
    assert all(not one & other for one, other in itertools.combinations(parts, 2))
    learned = {prompt for pool in fit_part(POOLS) for prompt in pool.prompts}
    assert not learned & (parts[1] | parts[2] | parts[3])
    assert evidence.off and all(text.startswith("c") for text in evidence.off), "of the domain that it is not about"
    assert len(evidence.fit) <= max(FIT_PROMPTS, OWN_FIT_PROMPTS)
    assert 0 < len(evidence.guard) <= max(GUARD_PROMPTS, OWN_GUARD_PROMPTS)
    assert 0 < len(evidence.judge) <= max(JUDGE_PROMPTS, OWN_JUDGE_PROMPTS)
    assert evidence.counts() == {
        "fit": len(evidence.fit),
        "guard": len(evidence.guard),
        "judge": len(evidence.judge),
        "off": len(evidence.off),
        "own_fit": sum(text.startswith("mine") for text in evidence.fit),
        "own_guard": sum(text.startswith("mine") for text in evidence.guard),
        "own_judge": sum(text.startswith("mine") for text in evidence.judge),
    }


def test_an_own_prompt_that_prepare_learned_from_is_never_held_out():
    evidence = draw_splits([f"a {n}" for n in (1, 5, 9, 0, 2, 4, 8, 13)], mixture(1.0, 0.0, 0.0).parts, POOLS, 0)
    learned = {prompt for pool in fit_part(POOLS) for prompt in pool.prompts}
    assert not learned & {*evidence.guard, *evidence.judge}


def test_own_prompts_come_first_and_pools_fill_up_in_the_proportion_of_the_mixture():
    evidence = draw_splits([f"mine {n}" for n in range(8)], mixture(0.75, 0.25, 0.0).parts, POOLS, 0)
    assert (evidence.own_fit, evidence.own_guard, evidence.own_judge) == (6, 1, 1)
    assert evidence.judge[0] in {f"mine {n}" for n in range(8)} - {evidence.guard[0], *evidence.fit[:6]}
    assert all(text.startswith("mine") for text in (evidence.judge[0], evidence.guard[0], *evidence.fit[:6]))
    rest = [text[0] for text in evidence.fit[6:]]
    assert rest.count("a") == pytest.approx(3 * rest.count("b"), abs=2)
    assert rest.count("c") == 0


@pytest.mark.parametrize(
    ("own", "alone"), [(16, "none"), (62, "judge"), (64, "fit, guard, judge"), (128, "fit, guard, judge")]
)
def test_own_prompts_decide_and_judge_alone_from_eight_on_and_choose_alone_from_forty_eight_on(own: int, alone: str):
    evidence = draw_splits([f"mine {n}" for n in range(own)], mixture(0.75, 0.25, 0.0).parts, POOLS, 0)
    parts = {"fit": evidence.fit, "guard": evidence.guard, "judge": evidence.judge}
    found = [name for name, texts in parts.items() if all(text.startswith("mine") for text in texts)]
    assert (", ".join(found) or "none") == alone


def test_an_unknown_scenario_is_filled_up_from_all_domains_alike():
    evidence = draw_splits([], mixture(1.0, 0.0, 0.0, unknown=1.0).parts, POOLS, 0)
    counts = [sum(text.startswith(name) for text in evidence.fit) for name in NAMES]
    assert counts == [FIT_PROMPTS // 3] * 3


def test_splitting_takes_every_fourth_text_and_loses_none():
    fit, guard, judge = split([str(n) for n in range(20)])
    assert (guard, judge) == (("7", "15"), ("3", "11", "19"))
    assert sorted((*fit, *guard, *judge), key=int) == [str(n) for n in range(20)]


@given(st.integers(0, 2000))
def test_of_own_prompts_enough_are_held_out_to_show_a_loss_as_far_as_enough_are_left_to_choose(count):
    fit, guard, judge = map(len, split([str(n) for n in range(count)], holding=Holding.SPACED))
    assert fit + guard + judge == count and judge - guard in (0, 1)
    assert count // 4 <= guard + judge <= max(count // 4, count // 2)
    if count <= 64 or count >= 256:
        assert guard + judge == count // 4
    else:
        assert fit >= OWN_CHOOSING and (guard == GUARD_PROMPTS or fit - OWN_CHOOSING <= max(0, count - 96))
    more = [len(part) for part in split([str(n) for n in range(count + 1)], holding=Holding.SPACED)]
    assert all(was <= now for was, now in zip((fit, guard, judge), more, strict=True)), "another prompt takes none away"


@pytest.mark.parametrize(
    ("count", "parts"), [(96, (48, 24, 24)), (128, (64, 32, 32)), (100, (50, 25, 25)), (200, (136, 32, 32))]
)
def test_the_own_prompts_that_are_held_out_are_evenly_spaced(count, parts):
    """A file sorted by kind or by length is split alike."""
    found = split([str(n) for n in range(count)], holding=Holding.SPACED)
    assert tuple(map(len, found)) == parts
    for part in found:
        steps = np.diff(np.array(part, dtype=int))
        assert steps.max() <= 4 * count / len(part), "no part leaves a stretch out"


@pytest.mark.parametrize(("count", "period"), [(64, 2), *itertools.product((96, 128, 192, 300), (2, 3, 4))])
def test_of_prompts_of_kinds_in_turn_every_kind_chooses_guards_and_judges(count, period):
    """A file may alternate between two languages, or ask every document four questions."""
    for part in split([f"{n} {n % period}" for n in range(count)], holding=Holding.SPACED):
        kinds = [text.split()[1] for text in part]
        fewest = min(kinds.count(str(kind)) for kind in range(period))
        assert fewest >= max(1, len(part) / period / 5)


def test_builds_of_earlier_versions_held_out_every_fourth_prompt():
    assert Holding.of({}) is Holding.EVERY_FOURTH and Holding.of({"holding": 2}) is Holding.SPACED
    with pytest.raises(ArtifactError, match="in way 3, which this version does not know"):
        Holding.of({"holding": 3})
    asked = [f"mine {n}" for n in range(96)]
    parts = np.full(3, 1 / 3)
    for holding in Holding:
        splits = draw_splits(asked, parts, POOLS, 0, holding=holding)
        fitted = seen(asked, holding)
        assert all(is_of(text, fitted) for text in splits.fit[: splits.own_fit] + splits.guard[: splits.own_guard])
        assert not any(is_of(text, fitted) for text in splits.judge[: splits.own_judge])
    assert draw_splits(asked, parts, POOLS, 0, holding=Holding.EVERY_FOURTH).judge[:2] == ("mine 3", "mine 11")


@pytest.mark.parametrize("order", ["by question", "by answer"])
def test_a_question_with_several_answers_is_in_one_part(order):
    numbers = [(n, k) for n in range(40) for k in range(3)] if order == "by question" else None
    numbers = numbers or [(n, k) for k in range(3) for n in range(40)]
    prompts = [answered(f"question {n}{' ' * k}", f"answer {k}") for n, k in numbers]
    assert sorted(map(len, split(prompts))) == [15, 15, 90]
    evidence = draw_splits(prompts, mixture(0.7, 0.3, 0.0).parts, POOLS, 0)
    assert (evidence.own_fit, evidence.own_guard, evidence.own_judge) == (90, 15, 15), "forty questions"
    parts = [set(map(bare, part)) for part in (evidence.fit, evidence.guard, evidence.judge)]
    assert all(not one & other for one, other in itertools.combinations(parts, 2))
    assert len(set(map(bare, seen_part(prompts)))) == 35


def divergence(*kl: float) -> Divergence:
    count = len(kl)
    places = tuple(range(count))
    return Divergence(mean_estimate(kl, seed=0), Estimate(1.0), places, kl, (1.0,) * count, (1,) * count)


def candidate(layout: str, plain: Divergence, with_repair: Divergence | None = None) -> Candidate:
    return Candidate(layout, Choice(np.ones((1, 2), dtype=bool), ((1, 2),)), plain, Repair({}), with_repair)


GOOD, BAD = divergence(*[0.1, 0.2, 0.15] * 4), divergence(*[0.5, 0.7, 0.6] * 4)


def test_a_repair_stays_unless_it_makes_the_guard_texts_worse():
    kept, dropped = candidate("uniform", BAD, GOOD), candidate("uniform", GOOD, BAD)
    assert kept.keeps_repair and kept.final is GOOD and kept.final_repair is not None
    assert not dropped.keeps_repair and dropped.final is GOOD and dropped.final_repair is None


def test_the_uniform_layout_is_taken_unless_it_costs_more():
    pair = {"uniform": candidate("uniform", GOOD), "per-layer": candidate("per-layer", BAD)}
    assert decide(pair).chosen.layout == "uniform"
    pair = {"uniform": candidate("uniform", BAD), "per-layer": candidate("per-layer", GOOD)}
    assert decide(pair).chosen.layout == "per-layer"


def test_one_unlucky_guard_text_does_not_drop_a_repair_but_too_few_texts_do():
    """Twelve texts better and one much worse is no evidence; three texts allow no interval, so the mean decides."""
    with_repair = divergence(*[0.1] * 12, 2.0)
    assert candidate("uniform", divergence(*[0.2] * 13), with_repair).keeps_repair
    few = candidate("uniform", divergence(0.2, 0.2, 0.2), divergence(0.1, 0.1, 0.5))
    assert not few.keeps_repair


def recipe(**options) -> Options:
    return Options(**options)


def test_without_a_word_about_axes_the_shipped_domains_are_the_domains():
    given = pools_of(recipe())
    assert (
        given.candidates == load_pools(POOLS_DIR)
        and given.outside == load_outside(POOLS_DIR / "outside")
        and given.axes is None
    )
    assert pools_suffix(recipe()) == ""


def test_axes_make_every_pool_a_candidate_and_an_ablation_makes_every_pool_a_domain():
    every = {pool.name for pool in (*load_pools(POOLS_DIR), *load_outside(POOLS_DIR / "outside"))}
    some, whole = pools_of(recipe(axes=4)), pools_of(recipe(axes=4, without=("axes",)))
    assert {pool.name for pool in some.candidates} == {pool.name for pool in whole.candidates} == every
    assert (some.axes, whole.axes) == (4, None) and some.outside == whole.outside == ()
    suffixes = {pools_suffix(recipe(**how)) for how in ({}, {"axes": 4}, {"axes": 5}, {"without": ("axes",)})}
    assert len(suffixes) == 4


def test_more_axes_than_pools_are_refused():
    with pytest.raises(InputError, match=r"--axes 900 asks for more.*--pools DIR"):
        pools_of(recipe(axes=900))
