"""Files of conversations from end to end: built from, kept in the artifact, and asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import inside
from test_cli import refused, run  # noqa: F401 (a fixture)

from sspcompile.request.prompts import answer_of, asked_of
from sspcompile.request.recipe import load_recipe
from sspcompile.request.scenario import scenario_of
from sspcompile.request.splits import Holding, seen_part
from training.corpus import items

FAST = ("--continuation-tokens", "2", "--max-tokens", "48", "--criterion", "subspace", "--repair", "none", "--quiet")
ASKED = list(items("chemistry", "train", 77, 16))


def line(number: int) -> dict:
    """Every other one with a system message and an earlier turn before the question; all of them answered."""
    item, before = ASKED[number], ASKED[number - 1]
    earlier = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": before.prompt},
        {"role": "assistant", "content": before.answer},
    ]
    asked = [{"role": "user", "content": item.prompt}, {"role": "assistant", "content": item.answer}]
    return {"messages": [*(earlier if number % 2 else []), *asked]}


@pytest.fixture(scope="module")
def home(tmp_path_factory, toolkits) -> Path:
    folder = tmp_path_factory.mktemp("talks")
    toolkits.put(folder, criteria=("fisher", "subspace"), max_tokens=48, continuation_tokens=2)
    (folder / "talks.jsonl").write_text("".join(json.dumps(line(n)) + "\n" for n in range(len(ASKED))))
    done = inside(folder, "build", "--scenario", "talks.jsonl", "--keep", "0.5", *FAST, "--out", "artifacts/talks")
    assert done.code == 0, done.err
    return folder


def test_the_artifact_holds_the_conversations_and_its_report_shows_them(home: Path) -> None:
    prompts = scenario_of(load_recipe(home / "artifacts/talks/recipe.yaml")).prompts
    assert len(prompts) == len(set(prompts)) == len(ASKED)
    assert asked_of(prompts[0]) == ASKED[0].prompt and answer_of(prompts[0]) is not None
    assert [m.role for m in asked_of(prompts[1])] == ["system", "user", "assistant", "user"]
    shown = json.loads((home / "artifacts/talks/report.json").read_text())["scenario"]["prompts"]
    assert shown[0] == ASKED[0].prompt and shown[1].startswith("system: Answer briefly.\nuser: ")


def test_the_artifact_is_asked_what_was_held_out_and_the_data_is_answered(home: Path, run) -> None:  # noqa: F811
    prompts = scenario_of(load_recipe(home / "artifacts/talks/recipe.yaml")).prompts
    done = run("eval", "talks", "--data", "talks.jsonl", "--items", "12", "--json", home=home)
    assert done.code == 0, done.err
    suite = done.json["suites"]["talks.jsonl"]
    assert suite["dropped"] >= len(seen_part(prompts, holding=Holding.SPACED))
    assert suite["prompts"] + suite["dropped"] == len(prompts)
    assert suite["conversations"] == suite["prompts"], "no line goes on from another, whose system message it lacks"
    assert suite["labelled"] == suite["prompts"] and suite["dense"]["answer_log_likelihood"] is not None
    assert "scenario" in done.json["suites"]
    again = run("build", "--scenario", "artifacts/talks/recipe.yaml", "--out", "again", "--dry-run", home=home)
    assert again.code == 0, again.err


def test_a_line_that_is_no_conversation_is_refused_before_anything_starts(home: Path, run) -> None:  # noqa: F811
    (home / "bad.jsonl").write_text(json.dumps({"messages": [{"role": "tool", "content": "x"}]}) + "\n")
    refused(run("build", "--scenario", "bad.jsonl", *FAST, home=home), 2, "bad.jsonl, line 1 message 1 .*role 'tool'")
    refused(run("eval", "talks", "--data", "bad.jsonl", home=home), 2, "bad.jsonl, line 1 message 1 .*role 'tool'")
