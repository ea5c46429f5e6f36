"""Texts that are read as they stand: without a template, every token behind the first few scored as a reference."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from builders import Shape, make_checkpoint

from sspcompile.api.evaluate import short_answers
from sspcompile.model.chat import PLAIN, Rendering
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.loading import load
from sspcompile.model.text import (
    OPENING_TOKENS,
    PASSAGE_TOKENS,
    Sentence,
    batches_of,
    continued,
    demand_readable,
    sentences,
)
from sspcompile.report.json import read_report
from sspcompile.request.domains import load_pools
from sspcompile.request.prompts import (
    PASSAGE_CHARACTERS,
    Passage,
    Prompt,
    answer_of,
    answered,
    as_prompt,
    asked_of,
    bare,
    is_open,
    passage,
    pasted,
    told,
)
from sspcompile.request.recipe import ScenarioSpec, dump_recipe, load_recipe
from sspcompile.request.request import read_request
from sspcompile.request.scenario import read_scenario, scenario_of
from sspcompile.request.splits import draw_splits

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}<assistant>"
TEXT = "Gold is a chemical element; it has the symbol Au and is one of the least reactive metals. " * 3


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    shape = Shape(layers=2, hidden=64, kv_heads=2, group_size=2, head_dim=16)
    found = load(make_checkpoint(tmp_path_factory.mktemp("model"), shape), fingerprint="")
    found.tokenizer.chat_template = TEMPLATE
    return found


def test_a_passage_is_read_without_the_template_and_scored_behind_its_opening(loaded: LoadedModel) -> None:
    prompts: tuple[Prompt, ...] = ("What is iron?", Passage(TEXT), answered("What is tin?", "A metal."))
    asked, one, other = continued(loaded, prompts, 4, 512)
    (raw,) = sentences(loaded.tokenizer, [TEXT], 512, Rendering(raw=True))
    assert one == Sentence(raw.ids[:PASSAGE_TOKENS], OPENING_TOKENS, reference=True)
    assert not asked.reference and asked == continued(loaded, ["What is iron?"], 4, 512)[0] and other.reference
    (batch,) = batches_of(loaded, [one])
    places = batch.score_mask[0].nonzero().flatten().tolist()
    assert places == list(range(OPENING_TOKENS - 1, len(one.ids) - 1)), "each foretells the next token"


def test_a_passage_is_the_same_whatever_the_template_and_without_continuations(loaded: LoadedModel) -> None:
    prompts = [Passage(TEXT)]
    for rendering in (PLAIN, Rendering(raw=True)):
        assert sentences(loaded.tokenizer, prompts, 512, rendering) == continued(loaded, prompts, 8, 512)
    assert continued(loaded, prompts, 0, 512) == continued(loaded, prompts, 8, 512)
    (short,) = sentences(loaded.tokenizer, prompts, 32, PLAIN)
    assert short.ids == continued(loaded, prompts, 8, 512)[0].ids[:32], "its beginning, not its end"


def test_a_passage_of_few_tokens_is_scored_in_its_second_half(loaded: LoadedModel) -> None:
    for text, opening in (("a", 1), ("ab cd", 2)):
        (one,) = sentences(loaded.tokenizer, [Passage(text)], 512, PLAIN)
        assert one.prompt == min(OPENING_TOKENS, max(1, len(one.ids) // 2)) and one.prompt >= min(opening, 1)
        assert one.reference == (len(one.ids) > one.prompt)
    demand_readable(loaded, [Passage("a")])


def test_a_line_of_text_is_a_passage_as_it_stands_and_with_an_answer_a_question(tmp_path: Path) -> None:
    rows = [{"text": "  def f():\n\treturn 1\n"}, {"text": "Gold?", "answer": "Au"}, {"text": "x" * 20_000}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    first, second, third = read_scenario(str(tmp_path / "t.jsonl"))[0].prompts
    assert first == Passage("  def f():\n\treturn 1\n") and second == answered("Gold?", "Au")
    assert third == Passage("x" * PASSAGE_CHARACTERS)
    assert [is_open(prompt) for prompt in (first, second, "Gold?")] == [False, False, True]
    assert asked_of(first) == first and answer_of(first) is None and short_answers(first) == ()
    assert told(first) == pasted(first) == "  def f():\n\treturn 1\n" and bare(first) == told(first).strip()


def test_passages_come_back_equal_from_a_recipe(tmp_path: Path) -> None:
    prompts = (passage("  a: b\n\n\tc # d\n"), "a text", passage("'\"\\ {x}: - [y]"), answered("Gold?", "Au"))
    spec = ScenarioSpec(prompts=prompts)
    assert ScenarioSpec.model_validate_json(spec.model_dump_json(exclude_none=True)) == spec
    (tmp_path / "s.jsonl").write_text(json.dumps({"text": "Gold is a metal."}), "utf-8")
    recipe = read_request(str(tmp_path / "s.jsonl"), {}, {}).recipe().model_copy(update={"scenario": spec})
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe), "utf-8")
    assert scenario_of(load_recipe(tmp_path / "r.yaml")).prompts == prompts
    assert as_prompt({"text": "a"}) == Passage("a")
    for wrong in ({"text": 7}, {"text": " "}, {"text": "a", "answer": "b"}, {"texts": "a"}):
        with pytest.raises(ValueError, match="must"):
            as_prompt(wrong)


def test_passages_choose_guard_and_judge_like_prompts() -> None:
    many = tuple(Passage(f"Text number {n} of many.") for n in range(200))
    pools = load_pools()
    splits = draw_splits(many, np.full(len(pools), 1 / len(pools)), pools, seed=0)
    assert (splits.own_fit, splits.own_guard, splits.own_judge) == (136, 32, 32)
    assert set(splits.fit) | set(splits.guard) | set(splits.judge) == set(many)


def test_a_build_of_texts_is_repaired_and_judged_on_them(run, tmp_path: Path, monkeypatch) -> None:
    """Perplexity is of every text that judges; what is asked in `eval` are the pools' questions, not the texts."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"text": f"The sum of {n} and {n + 2} is {2 * n + 2}. Nobody asks for it here, it is told."} for n in range(72)
    ]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fast = ("--continuation-tokens", "4", "--max-tokens", "48", "--baselines", "none", "--quiet")
    code, out, err = run("plan", "--scenario", "sums.jsonl", "--keep", "0.6", *fast[:4], "--cost", "--json")
    assert code == 0, err
    code, _, err = run("build", "--scenario", "sums.jsonl", "--keep", "0.6", "--out", "cut", *fast)
    assert code == 0, err
    report = read_report(tmp_path / "cut" / "report.json")
    (ours,) = (row for row in report.quality if row.role == "ours")
    assert ours.answer_perplexity is not None and ours.answer_perplexity.value > 0
    assert "text: The sum of 0 and 2" in (tmp_path / "cut" / "recipe.yaml").read_text()
    assert run("verify", "cut", "--quiet")[0] == 0
    code, out, err = run("eval", "cut", "--items", "8", "--json", "--quiet")
    assert code == 0, err
    assert "Nobody asks" not in out
