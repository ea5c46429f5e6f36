"""`import sspcompile`: the same as the command line, as values."""

from __future__ import annotations

import gc
import inspect
import typing
from pathlib import Path

import pytest
from builders import Shape, make_checkpoint
from transformers import PreTrainedModel
from transformers.utils import logging

import sspcompile
from sspcompile.api.artifact import Format
from sspcompile.api.export import FORMATS
from sspcompile.api.library import BuildKeywords
from sspcompile.cli.export import export as export_command
from sspcompile.errors import ArtifactError, BudgetError, InputError, OutputExistsError, RecipeError, ScenarioError
from sspcompile.model.placement import NAMES
from sspcompile.proof.prove import prove
from sspcompile.request.keywords import Keywords

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
