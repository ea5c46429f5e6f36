"""`plan --cost`: what is foretold, against what a build really runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from builders import Shape, make_checkpoint
from commands import inside, shell

from sspcompile.api.build import build
from sspcompile.api.cost import cost_of
from sspcompile.api.nested import build_nested
from sspcompile.api.parts import Lengths, continued
from sspcompile.errors import RecipeError
from sspcompile.model.dense import DenseModel, open_dense
from sspcompile.model.modules import input_norm
from sspcompile.request.request import read_request
from sspcompile.select.reading import read_through
from sspcompile.select.scoring import toolkit_of
from sspcompile.select.texts import Texts
from sspcompile.slicing.mask import load_mask
from sspcompile.workspace import Workspace

SENTENCE = "please tell me about acid"
PROMPTS = [f"How much is {n} times {n + 3} plus {7 * n}?" for n in range(56)]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    make_checkpoint(home / "model", Shape(layers=2, hidden=64, kv_heads=2, group_size=2, head_dim=16))
    (home / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return home


@pytest.fixture
def ran(monkeypatch) -> list[int]:
    """Token by layer, forward runs only, of the models that are loaded from here on."""
    ran, load = [0], DenseModel.load

    def counted(self, **options):
        loaded = load(self, **options)
        for layer in loaded.layers:
            input_norm(layer).register_forward_pre_hook(
                lambda _m, args: ran.__setitem__(0, ran[0] + args[0].shape[0] * args[0].shape[1])
            )
        return loaded

    monkeypatch.setattr(DenseModel, "load", counted)
    return ran


def foretold(cost, *, apart: tuple[str, ...] = ("proof",)) -> float:
    """Of what runs in the model that was loaded; the proof has a process of its own."""
    return sum(stage.tokens * stage.passes for stage in cost.stages if stage.name not in apart)


def test_builds_run_what_was_foretold_and_the_first_alone_reads_the_pools(home, ran):
    """Token by layer, forward runs only; the foretelling counts backward runs and normal equations as passes too."""
    given = {"model": str(home / "model"), "max_tokens": 64, "continuation_tokens": 4}
    own, dense, workspace = str(home / "prompts.txt"), open_dense(str(home / "model")), Workspace(home / "kept")
    builds = ((own, {"keep": 0.5}), (own, {"keep": 0.5}), (own, {"size": 0.8}), (SENTENCE, {"keep": 0.5}))
    totals, names = [], []
    for number, (scenario, budget) in enumerate(builds):
        request = read_request(scenario, given | budget, {})
        cost = cost_of(request, dense, workspace)
        names.append([stage.name for stage in cost.stages])
        ran[0] = 0
        build(request, dense, home / f"out-{number}", workspace)
        totals.append(ran[0] / 2)
        assert 0.5 * foretold(cost) <= totals[-1] <= 1.25 * foretold(cost), (scenario, budget)
    assert totals[1] < totals[0]
    assert "recognition: domain pools" in names[0] and not any("pools" in name for name in names[1])
    assert not any(name.endswith("on the pools") for some in names for name in some)


@pytest.mark.whole
def test_a_sentence_is_counted_by_the_texts_that_its_mixture_draws_once_the_pools_are_read(home):
    """Pools differ in length: all of them alike, as before their reading, would foretell another build."""
    given = {"model": str(home / "model"), "max_tokens": 64, "continuation_tokens": 4, "keep": 0.5}
    request, dense, workspace = read_request(SENTENCE, given, {}), open_dense(given["model"]), Workspace(home / "read")
    loaded = dense.load()

    def written_on() -> tuple[int, int]:
        (stage,) = [one for one in cost_of(request, dense, workspace).stages if one.name == "continuations"]
        return stage.texts, stage.tokens

    before = written_on()
    toolkit = toolkit_of(request, dense, loaded, workspace)
    drawn = read_through(request, toolkit, loaded, Texts(loaded, request.options), build=False).splits.every
    assert written_on() == (len(drawn), Lengths(loaded, 64).sum(drawn)) != before


def test_the_sentence_alone_has_the_pools_scored_by_a_criterion_that_is_named(home):
    dense, workspace = open_dense(str(home / "model")), Workspace(home / "fresh")
    given = {"model": str(home / "model"), "max_tokens": 64, "continuation_tokens": 4, "keep": 0.5}
    given |= {"criterion": "fisher"}
    for scenario, scored in ((str(home / "prompts.txt"), False), (SENTENCE, True)):
        stages = cost_of(read_request(scenario, given, {}), dense, workspace).stages
        names = {stage.name for stage in stages}
        assert "recognition: domain pools" in names and ("fisher on the pools" in names) == scored


@pytest.mark.whole
def test_a_nested_build_runs_what_was_foretold_and_more_with_every_member(home, ran):
    given = {"model": str(home / "model"), "max_tokens": 32, "continuation_tokens": 2}
    scenario = {"prompts_file": "prompts.txt", "domains": {"math": 1}}  # spares the model the pools
    recipe = {"schema_version": 1, "name": "several", "description": "Sums.", "scenario": scenario}
    (home / "several.yaml").write_text(json.dumps(recipe))

    def asked(**options):
        return read_request(str(home / "several.yaml"), given | options, {})

    dense, workspace, three = open_dense(str(home / "model")), Workspace(home / "several"), asked(nested="0.9,0.8")
    cost, fewer, bare = (
        cost_of(request, dense, workspace)
        for request in (three, asked(nested="0.8"), asked(nested="0.9,0.8", repair="none"))
    )
    ran[0] = 0
    build_nested(three, dense, home / "several-out", workspace)
    apart = ("proof", "proof of the members", "low-rank repairs")  # decompositions run no model
    expected = foretold(cost, apart=apart)
    assert 0.5 * expected <= ran[0] / 2 <= 1.25 * expected
    assert {*apart, "room for repairs of the members", "repairing the member of 0.9"} <= {
        stage.name for stage in cost.stages
    }
    assert foretold(fewer, apart=apart) < expected and fewer.peak_bytes <= cost.peak_bytes
    assert not any("low-rank" in stage.name for stage in bare.stages)


def test_a_recipe_that_states_its_domains_reads_no_pool_and_makes_no_toolkit(home, monkeypatch):
    given = {"model": str(home / "model"), "max_tokens": 64, "continuation_tokens": 4, "keep": 0.5}
    path = home / "stated.yaml"
    scenario = {"prompts_file": "prompts.txt", "domains": {"math": 3, "law": 1}}
    recipe = {"schema_version": 1, "name": "stated", "description": "Sums.", "scenario": scenario}
    path.write_text(json.dumps(recipe))
    request, dense = read_request(str(path), given, {}), open_dense(str(home / "model"))
    workspace = Workspace(home / "stated")
    stages = {stage.name: stage for stage in cost_of(request, dense, workspace).stages}
    assert not any(name.startswith("recognition") for name in stages)
    seen = set()
    outcome = build(request, dense, home / "stated-out", workspace, lambda name, _done, _total: seen.add(name))
    assert seen and not any("features" in name or "recognition" in name for name in seen)
    assert not workspace.toolkit(dense.fingerprint).parent.exists()
    # Off the scenario the texts are those that the stated domains leave, not of all pools alike.
    splits, judged = outcome.selection.reading.splits, stages["judging this build and its baselines"]
    read = continued((*splits.judge, *splits.off), Lengths(dense.load(), 64), 4)
    assert (judged.texts, judged.tokens) == (len(splits.judge) + len(splits.off), read)
    mixture = load_mask(home / "stated-out" / "mask.json").scenario["mixture"]
    assert {name: weight for name, weight in mixture.items() if weight} == {"law": 0.25, "math": 0.75}
    report = (home / "stated-out" / "report.md").read_text("utf-8")
    assert "The recipe says what the scenario is about" in report
    wrong = {**recipe, "scenario": {"prompts_file": "prompts.txt", "domains": {"maths": 1}}}
    (home / "wrong.yaml").write_text(json.dumps(wrong))
    monkeypatch.setattr(type(dense), "load", lambda *_, **__: pytest.fail("the model is loaded before"))
    with pytest.raises(RecipeError, match=r"unknown domain 'maths'; known: .*math"):
        build(read_request(str(home / "wrong.yaml"), given, {}), dense, home / "wrong-out", workspace)
    monkeypatch.undo()
    # Axes are chosen by what the model reads, so they are learned all the same.
    axes = read_request(str(path), given | {"axes": 4}, {})
    assert any(stage.name.startswith("recognition") for stage in cost_of(axes, dense, workspace).stages)
    assert outcome.toolkit.recogniser is None


def test_the_command_prints_minutes_and_memory_and_writes_nothing(home):
    before, plan = sorted(home.iterdir()), ("plan", "--model", "model", "--cost")
    shown = shell(home, *plan, "--scenario", "prompts.txt")
    assert shown.code == 0 and "at the peak" in shown.out and "domain pools" in shown.out
    found = inside(home, *plan, "--scenario", "prompts.txt", "--json").json
    assert found["seconds"] > 0 and found["peak_bytes"] > 1e8 and len(found["stages"]) == len(found["stage_seconds"])
    assert sorted(home.iterdir()) == before
    refused = inside(home, *plan)
    assert refused.code == 2 and "Give --scenario" in refused.err
