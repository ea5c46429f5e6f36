"""`eval` end to end on the embedded model, and the parts that it is made of."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import inside
from test_cli import refused, run  # noqa: F401 (a fixture)
from test_prepare_tools import TEMPLATE, tiny

from sspcompile.api.arguments import named
from sspcompile.api.evaluate import (
    Deployment,
    _built_for,
    _maybe_seen,
    _origin,
    deployment_of,
    fitted_prompts,
    scenario_suites,
)
from sspcompile.embedded import EMBEDDED, POOLS_DIR
from sspcompile.embedded.questions import questions
from sspcompile.evaluate.asking import Limits, ask
from sspcompile.evaluate.questions import Conversation, Question, single
from sspcompile.evaluate.results import mean_over_turns
from sspcompile.model.chat import takes_conversations
from sspcompile.request.conversations import is_of
from sspcompile.request.domains import load_pools
from sspcompile.request.prompts import Message
from sspcompile.request.splits import Holding, seen, seen_part, split
from sspcompile.workspace import Workspace
from training.corpus import items

PROMPTS = [item.prompt for item in items("chemistry", "train", 77, 24)]
FAST = ("--continuation-tokens", "2", "--max-tokens", "48", "--criterion", "subspace", "--quiet")
METRICS = ("exact_match", "keyword_recall", "answer_log_likelihood", "mean_kl", "top1_agreement")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    (folder / "mine.txt").write_text("\n".join(PROMPTS))
    labelled = [{"prompt": item.prompt, "answer": item.answer} for item in items("math", "heldout", 78, 12)]
    labelled.append({"prompt": PROMPTS[0], "answer": "fitted on"})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, labelled)))
    return folder


@pytest.fixture(scope="module")
def artifacts(home, toolkits) -> Path:
    """Two builds of one scenario: nothing cut, and nearly everything cut by random-like scores without repair."""
    toolkits.put(home, criteria=("fisher", "subspace"), max_tokens=48, continuation_tokens=2)
    for name, keep in (("full", "1"), ("cut", "0.25")):
        command = ("build", "--scenario", "mine.txt", "--keep", keep, *FAST, "--repair", "none")
        done = inside(home, *command, "--layout", "uniform", "--out", f"artifacts/{name}")
        assert done.code == 0, done.err
    return home / "artifacts"


def test_full_mask_measures_no_change_at_all(run, artifacts, home):  # noqa: F811
    done = run("eval", "full", "--items", "12", "--json", home=home)
    assert done.code == 0, done.err
    assert set(done.json["suites"]) == {"scenario", "off_domain"} and done.json["suite"] == "scenario"
    for suite in done.json["suites"].values():
        assert suite["dense"]["exact_match"] is not None
        assert suite["sliced"]["mean_kl"] == 0 and suite["sliced"]["top1_agreement"] == 1
        for metric in METRICS:
            assert suite["difference"][metric] == 0 and suite["difference"][f"{metric}_interval"] == [0, 0]
    table = run("eval", "full", "--items", "12", home=home)
    assert "no measurable change" in table.out and "LOSS" not in table.out and table.err == ""


def test_heavy_cut_is_called_a_loss_and_prompts_that_were_fitted_on_are_dropped(run, artifacts, home):  # noqa: F811
    args = ("eval", "cut", "--items", "30", "--data", "data.jsonl")
    done = run(*args, "--json", home=home)
    assert done.code == 0, done.err
    data = done.json["suites"]["data.jsonl"]
    assert (data["prompts"], data["labelled"], data["dropped"]) == (12, 12, 1)
    off = done.json["suites"]["off_domain"]
    assert off["difference"]["exact_match_interval"][1] < 0 < off["sliced"]["mean_kl"]
    assert off["dense"]["mean_kl"] == 0 and off["dense"]["top1_agreement"] == 1
    table = run(*args, home=home)
    assert "LOSS" in table.out and "1 prompts were left out" in table.out
    assert run(*args, "--json", home=home).json == done.json


def test_exported_folder_and_plain_folder_say_the_same_as_the_artifact(run, artifacts, home):  # noqa: F811
    assert run("export", "cut", "--out", "served", home=home).code == 0
    args = ("--data", "data.jsonl", "--json")
    whole = run("eval", "cut", *args, home=home).json["suites"]["data.jsonl"]
    for source in (("served",), ("artifacts/cut/model", "--against", "embedded")):
        found = run("eval", *source, *args, home=home).json["suites"]["data.jsonl"]
        assert found["prompts"] == 13 and found["dropped"] == 0
        assert found["sliced"]["exact_match"] * 13 == pytest.approx(whole["sliced"]["exact_match"] * 12)


def test_prompts_without_answers_get_no_exact_match(run, artifacts, home):  # noqa: F811
    held = [split(pool.prompts)[2][0] for pool in load_pools(POOLS_DIR)]
    (home / "pool.json").write_text(json.dumps(held))
    done = run("eval", "cut", "--data", "pool.json", "--json", home=home)
    suite = done.json["suites"]["pool.json"]
    assert suite["labelled"] == 0 and suite["prompts"] == len(held) and suite["sliced"]["mean_kl"] > 0
    for metric in METRICS[:3]:
        assert suite["dense"][metric] is suite["sliced"][metric] is suite["difference"][metric] is None


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("eval",), ("no last build",)),
        (("eval", "nowhere"), ("is neither a build, a cut, an export nor a model folder",)),
        (("eval", "{cut}/model"), ("cut from", "--against")),
        (("eval", "{cut}/model", "--against", "embedded"), ("scenario", "--data")),
        (("eval", "{cut}", "--data", "none.jsonl"), ("no file", "jsonl")),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(args, expected, run, artifacts, tmp_path):  # noqa: F811
    refused(run(*(a.replace("{cut}", str(artifacts / "cut")) for a in args), home=tmp_path), 2, *expected)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="the [eval] extra is installed")
def test_missing_harness_is_one_line_with_the_command_to_install_it(run):  # noqa: F811
    refused(run("eval", "--lm-eval", "anything"), 2, r"pip install 'sspcompile\[eval\]'")


def test_only_held_out_prompts_are_asked(artifacts, embedded):
    from sspcompile.api.arguments import cut_model
    from sspcompile.workspace import Workspace

    workspace = Workspace(artifacts.parent)
    contenders = cut_model("cut", None, workspace, option="--against")
    deployment = deployment_of(contenders, None, embedded, workspace, 0, lambda *_: None)
    fit, guard, held = split(PROMPTS, holding=Holding.SPACED)
    fitted = fitted_prompts(deployment, EMBEDDED)
    # A prompt of the scenario that stands in a pool as well may have taught `prepare`.
    learned = {text for pool in load_pools(POOLS_DIR) for text in seen_part(pool.prompts)}
    held = set(held) - learned
    assert all(is_of(text, fitted) for text in fit + guard)
    assert held and not any(is_of(text, fitted) for text in held)
    for labelled in (True, False):
        suites = scenario_suites(deployment, fitted, labelled=labelled, count=40, seed=0)
        asked = [turn.prompt for suite in suites for c in suite.conversations for turn in c.turns]
        assert not any(is_of(text, fitted) for text in asked) and held <= set(asked)


def test_of_a_build_that_held_out_every_fourth_prompt_nothing_that_chose_is_asked(artifacts, tmp_path):
    for name in ("recipe.yaml", "mask.json", "manifest.json"):
        shutil.copyfile(artifacts / "cut" / name, tmp_path / name)
    assert _built_for(tmp_path).fitted == seen(PROMPTS, Holding.SPACED)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["origin"].pop("holding") == 2
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert _built_for(tmp_path).fitted == seen(PROMPTS, Holding.EVERY_FOURTH) != seen(PROMPTS, Holding.SPACED)


def test_without_a_build_s_own_record_nothing_that_any_way_of_holding_out_chose_is_asked():
    """Earlier versions did not record the way."""
    either = seen(PROMPTS, Holding.SPACED) | seen(PROMPTS, Holding.EVERY_FOURTH)
    assert _maybe_seen(PROMPTS, {}) == either > seen(PROMPTS, Holding.SPACED)
    for way in Holding:
        assert _maybe_seen(PROMPTS, {"holding": int(way)}) == seen(PROMPTS, way)


def test_cuts_by_a_build_s_mask_and_exports_say_how_its_prompts_were_held_out(run, artifacts, tmp_path):  # noqa: F811
    assert run("slice", "--mask", artifacts / "cut" / "mask.json", "--out", tmp_path / "sliced", "--quiet").code == 0
    assert run("export", artifacts / "cut", "--out", tmp_path / "exported", "--quiet").code == 0
    places = {"sliced": {"holding": 2}, "exported": {"holding": 2}, "plain": {}}
    shutil.copytree(artifacts / "cut" / "model", tmp_path / "plain")
    for place, expected in places.items():
        origin = _origin(named(str(tmp_path / place), Workspace(tmp_path)))
        assert {name: origin[name] for name in origin if name == "holding"} == expected


def test_every_seed_asks_other_shipped_questions_and_none_twice():
    pools = tuple(load_pools(POOLS_DIR))
    deployment = Deployment({pool.name: float(pool.name == "math") for pool in pools}, (), frozenset(), pools)

    def asked(count, seed):
        suites = scenario_suites(deployment, frozenset(), labelled=True, count=count, seed=seed)
        return {suite.name: [turn for c in suite.conversations for turn in c.turns] for suite in suites}

    first, second = (asked(50, seed)["scenario"] for seed in (0, 1))
    assert len({turn.prompt for turn in (*first, *second)}) == 100
    assert {turn.domain for turn in first} == {"math"} and all(turn.answers for turn in first)
    everything = asked(10_000, 3)["scenario"]
    assert sorted(turn.prompt for turn in everything) == sorted(known.prompt for known in questions("math"))


CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<user> {{ m.content }} {% else %}"
    "<model> {{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}<model>{% endif %}"
)


def test_later_turns_are_asked_behind_the_model_s_own_answers():
    loaded = tiny(seed=1, template=CHAT)
    talk = Conversation((Question("war ?"), Question("king ?")))
    asked = ask(loaded, [talk, *single([Question("acid ?")])], Limits(64, 3, 2), lambda *_: None)
    led = (Message("user", "war ?"), Message("assistant", asked.texts[0]), Message("user", "king ?"))
    assert asked.prompts == ("war ?", led, "acid ?")
    alone = ask(loaded, single([Question("war ?")]), Limits(64, 3, 1), lambda *_: None)
    assert alone.texts[0] == asked.texts[0]


def test_without_a_template_turns_are_asked_one_by_one():
    loaded = tiny(seed=1)
    talk = Conversation((Question("war ?"), Question("king ?")))
    assert not takes_conversations(loaded.tokenizer)
    assert ask(loaded, [talk], Limits(64, 3, 2), lambda *_: None).prompts == ("war ?", "king ?")
    refusing = tiny(seed=1, template="{% if messages|length > 1 %}{{ raise_exception('one') }}{% endif %}" + TEMPLATE)
    assert not takes_conversations(refusing.tokenizer)


def test_interval_draws_whole_conversations():
    values = np.array([1.0, 1, 1, 1, 0, 0, 0, 0, 1, 0])
    alone = mean_over_turns(values, np.arange(10), seed=0)
    paired = mean_over_turns(values, np.repeat(np.arange(5), 2), seed=0)
    assert alone.value == paired.value == 0.5
    assert paired.high - paired.low > alone.high - alone.low
    assert mean_over_turns(values, np.zeros(10), seed=0).low is None
    assert mean_over_turns(np.full(3, np.nan), np.arange(3), seed=0) is None
