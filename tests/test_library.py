"""`import sspcompile`: the same as the command line, as values."""

from __future__ import annotations

import gc
import inspect
import json
import typing
from pathlib import Path

import numpy as np
import pytest
from builders import Shape, make_checkpoint
from transformers import PreTrainedModel
from transformers.utils import logging

import sspcompile
from sspcompile.api.artifact import Format
from sspcompile.api.export import FORMATS
from sspcompile.api.library import BuildKeywords, _request
from sspcompile.cli.export import export as export_command
from sspcompile.errors import ArtifactError, BudgetError, InputError, OutputExistsError, RecipeError, ScenarioError
from sspcompile.model.placement import NAMES
from sspcompile.proof.prove import prove
from sspcompile.request.keywords import Keywords
from sspcompile.request.options import Options

FAST = {"criterion": "subspace", "continuation_tokens": 2, "max_tokens": 48}
PROMPTS = [f"What is {n} plus {n + 1}?" for n in range(24)]


@pytest.fixture(scope="module")
def root(tmp_path_factory, toolkits) -> Path:
    root = tmp_path_factory.mktemp("work")
    toolkits.put(root, criteria=("fisher", "subspace"), max_tokens=48, continuation_tokens=2)
    return root


@pytest.fixture(scope="module")
def artifact(root) -> sspcompile.Artifact:
    return sspcompile.build(None, PROMPTS, root=root, layout="uniform", keep=0.75, **FAST)


def test_what_it_offers_is_listed_and_anything_else_is_an_attribute_error():
    assert set(sspcompile.__all__) <= set(dir(sspcompile))
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        _ = sspcompile.prune


@pytest.mark.parametrize("name", ["plan", "build"])
def test_options_are_typed_keywords(name):
    parameter = inspect.signature(getattr(sspcompile, name)).parameters["options"]
    assert parameter.kind is inspect.Parameter.VAR_KEYWORD and parameter.annotation == "Unpack[BuildKeywords]"
    hints = typing.get_type_hints(BuildKeywords)
    assert hints["keep"] == float | None and hints["threads"] == int | None
    assert set(hints) == {*typing.get_type_hints(Keywords), *NAMES}


def test_a_plan_needs_a_model_and_a_budget():
    plan = sspcompile.plan(keep=0.5)
    assert plan.sliced.kv_bytes_per_token * 2 == plan.dense.kv_bytes_per_token
    assert {verdict.runtime for verdict in plan.runtimes} >= {"vLLM", "ONNX Runtime"}


def test_a_frontier_is_of_the_layouts_and_the_service_that_are_asked_for():
    found = sspcompile.frontier(layout="uniform", context=100, batch=3)
    assert (found.serving.context, found.serving.batch) == (100, 3)
    assert {point.layout for point in found.points} == {"uniform"} and found.points[-1].share is None
    whole, half = (next(one for one in found.points if one.share == share) for share in (1.0, 0.5))
    assert half.parameters <= whole.parameters / 2 and half.memory_bytes < whole.memory_bytes
    assert sspcompile.plan(size=0.5, layout="uniform").sliced.parameters == half.parameters


def test_a_plan_of_a_folder_and_of_its_mask(tmp_path):
    model = make_checkpoint(tmp_path / "model", Shape(layers=2, hidden=64, kv_heads=2, group_size=2, head_dim=16))
    plan = sspcompile.plan(model, keep=0.5, layout="per-layer")
    assert plan.sliced.parameters < plan.dense.parameters


def test_a_build_gives_its_report_its_mask_and_its_options(artifact, root):
    assert artifact.path == root / "artifacts" / "prompts" and artifact.model_path.is_dir()
    assert artifact.report.mask.kept == artifact.mask.kept
    assert artifact.options.keep == 0.75 and artifact.options.criterion == "subspace"
    assert artifact.request.scenario.prompts == tuple(PROMPTS)
    assert artifact.plan()["kept_heads"] == sum(map(len, artifact.mask.kept))
    assert sspcompile.load(artifact.path).mask == sspcompile.load("prompts", root=root).mask == artifact.mask


def test_the_proof_finds_the_dense_model_gone(artifact, root, tmp_path, monkeypatch):
    def models() -> list[PreTrainedModel]:
        gc.collect()
        return [one for one in gc.get_objects() if issubclass(type(one), PreTrainedModel)]

    before, held = len(models()), []

    def proven(*given, **options):
        held.append(len(models()))
        return prove(*given, **options)

    monkeypatch.setattr("sspcompile.api.build.prove", proven)
    sspcompile.build(None, PROMPTS, root=root, out=tmp_path / "again", layout="uniform", keep=0.75, **FAST)
    assert held == [before]


def test_it_verifies_evaluates_and_exports(artifact, root, capfd):
    logging.enable_progress_bar()  # as a notebook has it; the suite turns the bars off
    assert artifact.verify().parity.holds
    (scenario, *_) = artifact.evaluate(items=6)
    assert scenario.name == "scenario"
    assert artifact.export("hf") == root / "exported" / "prompts-hf"
    assert (artifact.export("onnx", precision="int8") / "model.onnx").is_file()
    told = capfd.readouterr()
    logging.disable_progress_bar()
    assert told.out == "" and told.err == "", "a library prints nothing"


def test_the_smaller_model_is_there_to_be_used(artifact):
    model = artifact.load_model()
    assert model.model.config.num_attention_heads < 8


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sspcompile.plan(keep=2.0), RecipeError, "keep: must be less than or equal to 1"),
        (lambda: sspcompile.plan(keap=0.5), RecipeError, "keap: is not a known key; did you mean 'keep'"),
        (lambda: sspcompile.plan(keep=0.5, strength=0.5), RecipeError, "keep and strength exclude each other"),
        (lambda: sspcompile.plan(keep=0.001), BudgetError, "nearest feasible"),
        (lambda: sspcompile.plan(strength=0.5), InputError, "--strength needs a scenario"),
        (lambda: sspcompile.build(None, []), ScenarioError, "There are no prompts"),
        (lambda: sspcompile.build(None, "word"), ScenarioError, "is one word"),
        (lambda: sspcompile.load("nowhere"), ArtifactError, "nowhere is neither a build"),
    ],
)
def test_what_cannot_be_used_is_an_error_of_ours(call, error, message):
    with pytest.raises(error, match=message):
        call()


TAKEN = {
    "share": ({"size": np.float64(0.8)}, {"size": 0.8}),
    "share of 32 bits": ({"size": np.float32(0.5)}, {"size": 0.5}),
    "ratio": ({"keep": np.float64(0.5)}, {"keep": 0.5}),
    "whole ratio": ({"keep": np.int64(1)}, {"keep": 1}),
    "parameters": ({"max_params": np.int64(1_400_000)}, {"max_params": 1_400_000}),
    "memory": (
        {"max_memory": np.int64(25_000_000), "context": np.int32(64), "batch": np.int64(2)},
        {"max_memory": 25_000_000, "context": 64, "batch": 2},
    ),
    "seed and switch": ({"seed": np.int64(3), "raw": np.True_, "size": 0.8}, {"seed": 3, "raw": True, "size": 0.8}),
    "floors": ({"size": 0.8, "protect": {"chemistry": np.float64(0.5)}}, {"size": 0.8, "protect": {"chemistry": 0.5}}),
    "an array": ({"nested": np.array([1, 0.5])}, {"nested": "1,0.5"}),
    "sizes": ({"nested": [1, 0.5]}, {"nested": "1,0.5"}),
}


@pytest.mark.parametrize("case", TAKEN)
def test_numbers_may_be_those_of_numpy_wherever_python_gives_options(case):
    given, plain = TAKEN[case]
    one, other = (sspcompile.frontier(**options).as_mapping() for options in (given, plain))
    assert one == other
    assert _request(None, "Ask me.", given).options == Options(**plain)


def test_paths_are_taken_where_text_names_a_place(tmp_path, artifact):
    pools = tmp_path / "pools"
    pools.mkdir()
    prompts = [f"Say how rye loaf number {n} rises." for n in range(20)]
    pool = {"schema_version": 1, "name": "bakery", "description": "Bread.", "prompts": prompts}
    (pools / "bakery.yaml").write_text(json.dumps({**pool, "descriptions": prompts[:4]}))
    assert sspcompile.plan(size=0.8, pools=pools) == sspcompile.plan(size=0.8, pools=str(pools))
    (tmp_path / "q.jsonl").write_text('{"prompt": "What is 3 plus 9?", "answer": "12"}\n')
    asked = {"data": str(tmp_path / "q.jsonl"), "items": np.int64(1), "seed": np.int64(1)}
    by_path, by_list = (
        artifact.evaluate(scenario=scenario, **asked)
        for scenario in (tmp_path / "q.jsonl", [{"prompt": "What is 3 plus 9?", "answer": "12"}])
    )
    assert [one.name for one in by_path] == [one.name for one in by_list] and len(by_path) >= 2
    assert all(one.prompts == 1 for one in by_path)


WRONG = {
    "no items": (lambda a: a.evaluate(items=0), "items is 0. Give a whole number, 1 or more."),
    "fewer items": (lambda a: a.evaluate(items=-1), "items is -1"),
    "half an item": (lambda a: a.evaluate(items=2.5), "items is 2.5"),
    "seed below zero": (lambda a: a.evaluate(seed=-1), "seed is -1. Give a whole number, 0 to 4294967295."),
    "data that is a number": (lambda a: a.evaluate(data=5), "data is 5, and neither text nor a path"),
    "scenario that is a number": (lambda a: a.evaluate(scenario=5), "scenario is 5, and neither text nor prompts"),
    "an empty scenario": (lambda a: a.evaluate(scenario=[]), "There are no prompts"),
    "precision": (lambda a: a.weigh("int3"), "Nothing is weighed in 'int3'. Accepted: int8, int4, q8_0, q4_0."),
    "positions as text": (lambda a: a.export("onnx", context_length="64"), "context_length is '64'"),
    "no positions": (lambda a: a.export("onnx", context_length=0), "context_length is 0"),
    "type that is a number": (lambda a: a.export("gguf", type=8), "type is 8. Give text."),
    "size as text": (lambda a: a.export("hf", size="0.8"), "size is '0.8'. Give a number"),
    "tokens as text": (lambda _: trimmed(tokens="500"), "tokens is '500'. Give a whole number"),
    "tokens in parts": (lambda _: trimmed(tokens=500.7), "tokens is 500.7"),
    "no tokens": (lambda _: trimmed(tokens=0), "tokens is 0"),
    "loss as text": (lambda _: trimmed(max_loss="0.1"), "max_loss is '0.1'. Give a number"),
    "loss that is none": (lambda _: trimmed(max_loss_off=float("nan")), "max_loss_off is nan"),
    "model that is a number": (lambda _: sspcompile.plan(5), "model is 5, and neither text nor a path"),
    "mask that is a number": (lambda _: sspcompile.plan(mask=5), "mask is 5"),
    "root that is a number": (lambda _: sspcompile.plan(root=5), "root is 5"),
    "pools that are a number": (lambda _: sspcompile.plan(pools=5), "pools: must be text, not 5"),
    "sizes that are none": (lambda _: sspcompile.plan(nested=[1, "x"]), "nested: must be shares above 0"),
    "place that is none": (lambda _: sspcompile.load(None), "path is None"),
    "scenario of a build": (lambda _: sspcompile.build(None, 5), "scenario is 5"),
    "no scenario": (lambda _: sspcompile.build(None, None), "No scenario was given"),
    "criterion": (lambda _: sspcompile.plan(criterion="nosuch"), "Unknown criterion 'nosuch'"),
    "criterion of a frontier": (lambda _: sspcompile.frontier(criterion="nosuch"), "Unknown criterion 'nosuch'"),
    "floor": (lambda _: sspcompile.plan(protect={"nosuch": 0.05}), "--protect names no known domain: nosuch"),
    "pools that are not there": (lambda _: sspcompile.plan(pools="/nonexistent"), "/nonexistent"),
    "axes": (lambda _: sspcompile.plan(axes=900), "--axes 900 asks for more domains than there are pools"),
    "repair": (lambda _: sspcompile.plan(repair="flap-bias"), "has no bias"),
}


def trimmed(**bounds):
    return sspcompile.trim(None, "Ask me about chemistry.", out="never", **bounds)


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_meant_is_refused_at_the_front_and_says_what_can(case, artifact, monkeypatch):
    call, expected = WRONG[case]
    monkeypatch.setattr("sspcompile.model.dense.DenseModel.load", None)  # nothing is loaded before it is refused
    with pytest.raises(InputError) as caught:
        call(artifact)
    assert expected in str(caught.value) and "\n" not in str(caught.value) and caught.value.hint


def test_the_graph_has_as_many_positions_as_numpy_says(artifact, tmp_path):
    folder = artifact.export("onnx", tmp_path / "graph", context_length=np.int64(64))
    assert json.loads((folder / "genai_config.json").read_text())["model"]["context_length"] == 64


def test_a_finished_build_is_not_replaced_unasked(artifact, root):
    with pytest.raises(OutputExistsError):
        sspcompile.build(None, PROMPTS, root=root, **FAST)


def test_library_command_and_export_know_the_same_formats():
    (shown,) = (parameter.metavar for parameter in export_command.params if parameter.name == "form")
    assert typing.get_args(Format) == FORMATS and shown == f"[{'|'.join(FORMATS)}]"


@pytest.mark.parametrize(("form", "option"), [("hf", {"context_length": 64}), ("onnx", {"host": "granite"})])
def test_an_option_of_another_format_is_refused(artifact, form, option):
    with pytest.raises(InputError, match="belongs to --format"):
        artifact.export(form, **option)
