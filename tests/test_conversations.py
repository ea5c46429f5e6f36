"""The turns of a conversation, and the answers of a question, are on one side of every split."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import Shape, make_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from sspcompile.api.evaluate import Deployment, data_suite, fitted_prompts, scenario_suites
from sspcompile.intervals import mean_estimate
from sspcompile.model.loading import load
from sspcompile.request.conversations import FEWEST_WAYS, Opening, asked_in, is_of, openings
from sspcompile.request.domains import DomainPool
from sspcompile.request.options import Options
from sspcompile.request.prompts import Message, Prompt, answered, as_prompt, bare, passage, told
from sspcompile.request.splits import Holding, Splits, draw_splits, seen, split
from sspcompile.select.judging import Judge
from sspcompile.select.search import comparing, comparison_parts
from sspcompile.select.texts import Texts
from sspcompile.slicing.mask import Kept

SYSTEM = Message("system", "You help customers of a bank.")
POOLS = tuple(DomainPool(name, name, (), tuple(f"{name} {n}" for n in range(100))) for name in ("a", "b"))
EVEN = np.array([0.5, 0.5])


def log(numbers: Sequence[int], turns: int, *, system: bool = True, greeting: str | None = None) -> list[Prompt]:
    """A line for every request, each with the conversation so far and the answer to it."""
    lines = []
    for number in numbers:
        said = [SYSTEM] if system else []
        for turn in range(turns):
            first = greeting if turn == 0 else None
            said.append(Message("user", first or f"question {turn} of talk {number}"))
            said.append(Message("assistant", f"answer {turn}" + (f" of talk {number}" if first is None else "")))
            lines.append(as_prompt([{"role": m.role, "content": m.content} for m in said]))
    return lines


def talk_of(prompt: Prompt) -> str:
    return told(prompt).split("of talk ")[1].split("\n")[0]


def talks(texts: Sequence[Prompt]) -> set[str]:
    return {talk_of(text) for text in texts if " of talk " in told(text)}


def drawn(prompts: Sequence[Prompt], pools: Sequence[DomainPool] = POOLS) -> Splits:
    return draw_splits(prompts, EVEN, pools, 0)


@given(st.integers(1, 30), st.integers(1, 6), st.booleans(), st.randoms(use_true_random=False))
def test_no_conversation_stands_on_both_sides_whatever_the_order_of_the_log(count, turns, system, rng):
    lines = log(range(count), turns, system=system)
    rng.shuffle(lines)
    parts = split(lines)
    assert sorted(map(told, itertools.chain(*parts))) == sorted(map(told, lines)), "none is lost"
    assert all(not talks(one) & talks(other) for one, other in itertools.combinations(parts, 2))
    assert [len(part) // turns for part in parts] == [count - count // 4, count // 8, (count + 4) // 8]
    found = drawn(lines)
    parts = (found.fit, found.guard, found.judge)
    assert all(parts) and all(not talks(one) & talks(other) for one, other in itertools.combinations(parts, 2))
    # What judges is not known from texts that chose, in whichever turn.
    fitted = seen(lines, holding=Holding.SPACED)
    assert all(is_of(text, fitted) for text in found.fit[: found.own_fit] + found.guard[: found.own_guard])
    assert not any(is_of(text, fitted) for text in found.judge[: found.own_judge])


@pytest.mark.parametrize("system", [True, False])
def test_conversations_that_all_begin_with_a_greeting_are_told_apart_by_what_follows(system):
    lines = [answered("Hi", "answer 0"), *log(range(24), 3, system=system, greeting="Hi")]
    fit, guard, judge = (talks(part) for part in split(lines))
    assert len(fit) > len(guard) > 0 and judge and not (fit & guard or fit & judge or guard & judge)
    # Neither a system message, nor examples before every question, nor a document there make one of many.
    example = (Message("user", "Is gold a metal?"), Message("assistant", "Yes."))
    few_shot = [(*example, Message("user", f"question 0 of talk {n}")) for n in range(16)]
    documents = [(Message("system", f"Document of talk {n}"), Message("user", "Summarise.")) for n in range(16)]
    for many in (few_shot, documents):
        assert [len(part) for part in split(many)] == [12, 2, 2]


@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_few_conversations_of_many_turns_are_not_torn_apart_but_filled_up_from_the_pools(count):
    lines = log(range(count), 20)
    found = drawn(lines)
    assert found.own_guard == 0 and found.own_judge == (20 if count >= 4 else 0)
    assert len(found.guard) > 8 and not talks(found.guard)
    assert not talks(found.fit) & talks(found.judge)


def test_a_greeting_is_not_taken_for_a_question_with_many_answers():
    asked = [answered(f"question {n} of talk {n}", f"answer {k}") for n in range(8) for k in range(9)]
    assert [len(part) for part in split(asked)] == [54, 9, 9]
    same = [(Message("user", "Hi"), Message("assistant", f"{n}"), Message("user", "More?")) for n in range(FEWEST_WAYS)]
    assert len({*openings(["Hi", *same]).values()}) == FEWEST_WAYS + 1
    assert openings(["Hi", *same])["Hi"] == Opening("Hi", alone=True)
    assert len({*openings(["Hi", *same[1:]]).values()}) == 1, "so few may as well be one that was tried again"


@pytest.mark.parametrize("kinds", [1, 3, 4, 5, 7, 40])
def test_a_few_tasks_for_many_documents_are_as_many_conversations(kinds: int):
    """A document in the system message, or a greeting in front, tells what is asked behind it apart."""
    tasks = [(Message("system", f"Document of talk {n}"), Message("user", f"task {n % kinds}")) for n in range(96)]
    greeted = [
        (Message("user", f"Hi {n % kinds}"), Message("assistant", "Hello."), Message("user", f"question of talk {n}"))
        for n in range(96)
    ]
    for many in (tasks, greeted, [*(f"Hi {n}" for n in range(kinds)), *greeted]):
        found = drawn(many)
        # Forty greetings that open two or three talks each are forty conversations: ten are held out.
        fewest, most = (8, 17) if len(many) == 96 + 40 else (20, 28)
        assert fewest <= found.own_guard <= most and fewest <= found.own_judge <= most
        assert len(talks(found.fit)) + len(talks(found.guard)) + len(talks(found.judge)) == 96
        assert not any(is_of(text, seen(many, holding=Holding.SPACED)) for text in found.judge[: found.own_judge])


def test_texts_and_passages_are_split_as_they_ever_were():
    texts = [*(f"text {n}" for n in range(10)), " text 3 ", passage("  text 4"), passage("other")]
    assert openings(texts) == {bare(text): Opening(bare(text)) for text in texts}
    fit, guard, judge = split(texts)
    assert (guard, judge) == (("text 7",), ("text 3", " text 3 ")) and len(fit) == 10


def test_a_pool_prompt_that_opens_an_own_conversation_or_stands_in_one_is_not_asked_beside_it():
    own = [
        as_prompt(
            [
                {"role": "system", "content": "S"},
                {"role": "user", "content": f"{POOLS[0].prompts[3 + 4 * n]}"},
                {"role": "assistant", "content": "Yes."},
                {"role": "user", "content": f"{POOLS[1].prompts[3 + 4 * n]}"},
            ]
        )
        for n in range(6)
    ]
    assert asked_in(own) == {f"{name} {3 + 4 * n}" for name in "ab" for n in range(6)}
    found = drawn(own)
    assert not asked_in(own) & {*found.guard, *found.judge, *found.off, *found.fit}
    # `prepare` learned from these; so no conversation that begins with one judges.
    learned = [(SYSTEM, Message("user", f"a {n}")) for n in (0, 1, 2, 4, 5, 6, 8, 9)]
    found = drawn(learned)
    assert (found.own_guard, found.own_judge) == (0, 0)


def test_what_a_build_judges_by_conversations_it_averages_and_draws_by_conversations(tmp_path: Path):
    shape = Shape(layers=3, hidden=64, kv_heads=4, group_size=2, head_dim=16)
    loaded = load(make_checkpoint(tmp_path, shape), fingerprint="")
    options = Options(max_tokens=32, continuation_tokens=2)
    spared = DomainPool("spared", "x", (), tuple(f"spared {n}" for n in range(40)))
    found = draw_splits(log(range(80), 3), EVEN, POOLS, 0, {"spared": (spared,)})
    judge = Judge(loaded, found, options, Texts(loaded, options), dtype=torch.float32)
    kept = np.ones((3, 8), dtype=bool)
    kept[0, :4] = False
    reported, guarded = judge.reported(Kept(kept)).own, judge.guarded(Kept(kept))
    assert judge.judged().owners == reported.owners
    for one in (reported, guarded):
        assert [one.owners.count(number) for number in range(16)] == [3] * 16
        drawn_as_one = mean_estimate(np.array(one.kl_per_prompt).reshape(16, 3).mean(1), seed=options.seed)
        found, expected = ((it.value, it.low, it.high) for it in (one.mean_kl, drawn_as_one))
        assert found == pytest.approx(expected, rel=1e-9)
        assert one.top1_agreement.value == pytest.approx(np.mean(one.agreement_per_prompt))
    assert judge.protected("guard", Kept(kept))["spared"].owners == (), "prompts of pools are independent"


@pytest.mark.parametrize(("count", "turns"), [(80, 3), (5, 8), (2, 20), (1, 40)])
def test_masks_are_compared_on_other_conversations_than_those_that_repair_them(tmp_path: Path, count: int, turns: int):
    shape = Shape(layers=1, hidden=32, kv_heads=2, group_size=1, head_dim=16)
    loaded = load(make_checkpoint(tmp_path, shape), fingerprint="")
    options = Options(max_tokens=64, continuation_tokens=2)
    lines = log(range(count), turns)
    judge = Judge(loaded, drawn(lines), options, Texts(loaded, options), dtype=torch.float32)
    splits = judge.splits
    assert splits.own_fit > 0 and (count >= 64) == (splits.own_fit == len(splits.fit)), "pools fill up"
    own = dict(zip(map(id, judge.sentences), splits.owners(splits.fit)[: splits.own_fit], strict=False))
    fit, held = ({own[id(text)] for text in part if id(text) in own} for part in comparison_parts(judge))
    assert fit and held, "the scenario's own texts compare, however few conversations they are"
    assert count < 3 or not fit & held


@pytest.mark.parametrize(
    "turns", [[1, 1, 60], [1, 60, 1], [1, 1, 200, 1], [2, 2, 2, 2, 60], [60, 1, 1, 1, 1], [1] * 50 + [40], [3] * 20]
)
def test_however_unequal_conversations_are_masks_are_repaired_and_compared_on_enough_texts(turns: list[int]):
    owners = [number for number, count in enumerate(turns) for _ in range(count)]
    held = comparing(owners, len(owners))
    assert len(owners) // 8 <= sum(held) <= len(owners) // 2 and any(held)
    talks = (
        {owner for owner, compares in zip(owners, held, strict=True) if compares is side} for side in (True, False)
    )
    assert max(turns) == 60 or max(turns) == 200 or not set.intersection(*talks)
    # Those of pools behind them are dealt as well, and make up for nothing.
    assert (
        sum(comparing([*owners, *range(len(turns), len(turns) + 64)], len(owners))[: len(owners)]) >= len(owners) // 8
    )


def test_eval_asks_nothing_of_a_conversation_that_was_fitted_and_something_of_every_part_of_a_file(tmp_path: Path):
    lines = log(range(80), 3)
    deployment = Deployment({"a": 0.5, "b": 0.5}, tuple(lines), seen(lines, Holding.SPACED), POOLS)
    fitted = fitted_prompts(deployment, "x")
    chosen = split(lines, holding=Holding.SPACED)
    (suite,) = scenario_suites(deployment, fitted, labelled=False, count=6, seed=0)
    asked = [turn.prompt for one in suite.conversations for turn in one.turns]
    assert not talks(asked) & talks(chosen[0] + chosen[1])
    assert len(asked) == 6 and max(int(talk_of(one)) for one in asked) > 60, "not the first of a sorted file"
    (every,) = scenario_suites(deployment, fitted, labelled=False, count=48, seed=0)
    assert len(every.conversations) == 48 and len({*every.owners}) == 16, "turns of one conversation are drawn as one"
    # The user's data: later turns of what was fitted, as they stand in another log.
    file = tmp_path / "data.jsonl"
    later = [{"messages": [{"role": m.role, "content": m.content} for m in line]} for line in log(range(80), 4)]
    file.write_text("\n".join(map(json.dumps, later)))
    kept = data_suite(file, fitted, count=None, seed=0)
    assert talks([turn.prompt for one in kept.conversations for turn in one.turns]) == talks(chosen[2])
    assert len({*kept.owners}) == len(talks(chosen[2])) == len(kept.conversations) / 4
    assert kept.dropped == 4 * len(talks(chosen[0] + chosen[1]))
