"""`build --nested` and what its users type next: one artifact, its members, and what is refused."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from builders import Shape, make_checkpoint
from huggingface_hub import ModelCard

import sspcompile
from sspcompile.api.nested import build_nested
from sspcompile.checkpoint import check_manifest
from sspcompile.errors import ArtifactError, InputError, ParityError
from sspcompile.model import journal
from sspcompile.model.dense import open_dense
from sspcompile.nested.index import read_nested
from sspcompile.request.request import read_request
from sspcompile.slicing.mask import load_mask
from sspcompile.workspace import Workspace

SHARES = (1.0, 0.9, 0.8, 0.7)
OPTIONS = {"max_tokens": 16, "continuation_tokens": 3, "model": "model", "nested": "1,0.9,0.8,0.7"}
SCENARIO = "Questions about the chemistry of metals"


def request_of(**changed):
    return read_request(SCENARIO, {**OPTIONS, **changed}, {})


def build(out: str = "nested", progress=lambda *_: None):
    return build_nested(request_of(), open_dense("model"), Path(out), Workspace(Path()), progress)


def interrupting(place: str, told: list[str] | None = None):
    """Ends the run at the last step of a stage."""

    def progress(stage, done, total):
        if told is not None:
            told.append(stage)
        if stage == place and done == total:
            raise KeyboardInterrupt

    return progress


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, and an artifact whose build was interrupted in the middle of its repairs, and went on from Python."""
    home = tmp_path_factory.mktemp("home")
    make_checkpoint(home / "model", Shape(family="qwen2", layers=3, hidden=64, kv_heads=4, group_size=2, head_dim=8))
    with contextlib.chdir(home), pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            build(progress=interrupting("repair (member 0.8)"))
        assert not Path("nested").exists() and not list(Path().glob(".partial-*"))
        (left,) = Path("artifacts").glob(".unfinished-*")
        assert journal.holds_work(left)
        built = sspcompile.build(scenario=SCENARIO, out="nested", **OPTIONS)
        assert isinstance(built, sspcompile.NestedArtifact) and built.path == Path("nested")
        assert not list(Path("artifacts").glob(".unfinished-*"))
    return home


@pytest.fixture
def inside(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setenv("SSPCOMPILE_HOME", ".")
    return home


def refused(done: tuple[int, str, str], code: int, *expected: str) -> None:
    assert done[0] == code and done[1] == "" and done[2].startswith("Error: ") and done[2].count("\n") == 1, done
    assert all(text in done[2] for text in expected), done


def test_the_artifact_is_whole_and_its_members_are_nested_and_measured(inside):
    assert check_manifest(Path("nested")).origin["nested"] == list(SHARES)
    nested = read_nested(Path("nested"))
    assert [one.share for one in nested.members] == list(SHARES)
    assert nested.members[0].own.mean_kl.value == 0 and nested.members[0].size == 1
    for larger, smaller in zip(nested.members, nested.members[1:], strict=False):
        assert smaller.size <= smaller.share and smaller.parameters < larger.parameters
        assert smaller.own.mean_kl.value > 0 and smaller.own.mean_kl.low is not None
        small, large = (load_mask(Path("nested", one.mask)).units for one in (smaller, larger))
        assert (small.heads <= large.heads).all()
        assert large.channels is None or (small.channels <= large.channels).all()
    assert any(one.repair for one in nested.members), "something is repaired"
    held = sum(path.stat().st_size for path in Path("nested/model").rglob("*.safetensors"))
    assert held <= 1.15 * nested.members[0].weight_bytes + 4096 * len(SHARES), "within the budget, but for headers"
    assert not [path for path in Path().iterdir() if path.name.startswith(".")], "nothing is left of the proofs"


def test_a_member_is_an_ordinary_cut_that_verify_proves(run, inside, tmp_path):
    out = tmp_path / "member"
    code, text, err = run("slice", "--from", "nested", "--size", "0.85", "--out", out)
    assert code == 0 and str(out) in text, err
    assert load_mask(out / "mask.json").size_requested == 0.8, "a size in between takes the next smaller member"
    code, text, err = run("verify", out, "--json", "--layerwise")
    assert code == 0 and json.loads(text)["same_text"], err
    code, text, _ = run("inspect", out, "--json")
    assert code == 0 and json.loads(text)["size_requested"] == 0.8


def test_a_member_is_cut_without_torch(inside, tmp_path):
    command = ["slice", "--from", "nested", "--size", "0.7", "--out", str(tmp_path / "cut")]
    lines = ("import sys", "from sspcompile.cli.main import main", f"try: main({command})")
    code = "\n".join((*lines, "finally: print('torch' in sys.modules)"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.stdout.endswith("False\n") and (tmp_path / "cut" / "config.json").is_file(), done


def test_the_curve_is_shown_by_inspect_and_plan(run, inside):
    for command in (("inspect", "nested"), ("plan", "--from", "nested"), ("inspect",)):
        code, text, err = run(*command, "--json")
        assert code == 0, err
        assert [one["share"] for one in json.loads(text)["members"]] == list(SHARES)
    code, text, _ = run("inspect", "nested")
    assert code == 0 and "0.7" in text and "nats" in text
    assert json.loads(Path("nested/frontier.json").read_text())["members"][1]["own"]["mean_kl"]["low"] is not None
    assert Path("nested/frontier.svg").read_text().startswith("<svg") and Path("nested/frontier.html").is_file()


def test_what_takes_one_model_says_how_to_cut_one_out(run, inside, tmp_path):
    for command in (("eval", "nested"), ("export", "nested")):
        refused(run(*command), 2, "several sizes", "sspcompile slice --from nested --size")
    refused(run("eval", "nested"), 2, "`sspcompile eval` does not take it")
    # A member that was cut out has no report to compare either.
    refused(run("compare", "nested", "nested"), 2, "several sizes", "It takes a build", "sspcompile inspect nested")
    refused(run("slice", "--from", "nested", "--size", "0.1", "--out", tmp_path / "x"), 3, "0.7", "--size 0.1")
    refused(run("slice", "--from", "model", "--size", "0.5", "--out", tmp_path / "x"), 2, "nested artifact")
    refused(run("slice", "--from", "nested", "--out", tmp_path / "x"), 2, "--size")
    refused(run("slice", "--from", "nested", "--size", "70", "--out", tmp_path / "x"), 2, "--size 70 is not a share")
    refused(run("run", "nested", "--size", "70", "--prompt", "x"), 2, "--size 70 is not a share")
    refused(run("slice", "--out", tmp_path / "x"), 2, "--mask")
    refused(run("slice", "--from", "nested", "--size", "0.7", "--out", "nested/x"), 2, "inside")
    for words in (("slice", "--from", "nested"), ("export", "nested", "--format", "onnx"), ("export", "nested")):
        refused(run(*words, "--size", "0.7", "--out", "nested", "--overwrite"), 2, "is what the command reads")
    refused(run("plan", "--model", "model", "--nested", "1,0.8"), 2, "--size 0.8", "plan --cost")
    hopeless = ("--scenario", SCENARIO, "--model", "model", "--nested", "0.01")
    refused(run("plan", "--cost", *hopeless), 3, "nearest feasible")
    refused(run("build", *hopeless), 3, "nearest feasible")


def test_bench_measures_the_smallest_member_as_a_draft(run, inside):
    code, text, err = run("bench", "nested", "--new-tokens", "10", "--repeats", "1", "--json", "--quiet")
    assert code == 0, err
    found = json.loads(text)
    assert found["draft"] == 0.7 and found["new_tokens"] == 10 and len(found["texts"]) > 1
    for one in found["texts"]:
        assert 0 <= one["accepted"] <= one["proposed"] and one["accepted"] + one["passes"] == 10 and one["same_text"]
    assert found["acceptance"]["value"] == sum(one["accepted"] for one in found["texts"]) / sum(
        one["proposed"] for one in found["texts"]
    )
    code, text, err = run("bench", "nested", "--quick", "--new-tokens", "4")
    assert code == 0 and "of the proposed tokens" in text and "tokens/s" in text, err
    refused(run("bench", "nested", "--runtimes", "onnx"), 2, "--runtimes", "slice --from nested")
    refused(run("bench", "nested", "--memory", "1GB"), 2, "--memory")


def test_every_size_goes_to_onnx_or_one_of_them_anywhere(run, inside, tmp_path):
    out = tmp_path / "several"
    short = ("--context-length", "32", "--json", "--quiet")
    code, text, err = run("export", "nested", "--format", "onnx", "--out", out, *short)
    assert code == 0 and {"model.onnx", "model-0.7.onnx", "sizes.json"} <= set(json.loads(text)["files"]), err
    assert "`model-0.7.onnx`" in (out / "README.md").read_text()
    asked = ("--size", "0.75", "--prompt", "What is iron?", "--max-new-tokens", "4", "--json")
    texts = [json.loads(run("run", folder, *asked)[1])["texts"][0]["text"] for folder in (out, "nested")]
    whole = json.loads(run("run", "nested", *asked[2:])[1])["texts"][0]["text"]
    assert texts[0] == texts[1] != whole
    code, _, err = run("export", "nested", "--size", "0.8", "--out", tmp_path / "one")
    assert code == 0 and load_mask(tmp_path / "one" / "mask.json").size_requested == 0.8, err
    one = sspcompile.load("nested").export("onnx", tmp_path / "alone", size=0.8, context_length=8)
    assert not (one / "sizes.json").exists() and not list(Path("exported").iterdir()), "the cut between is gone"
    refused(run("export", "nested", "--format", "onnx", "--precision", "int4"), 2, "--precision int4", "--size 0.8")
    refused(run("export", "model", "--size", "0.8"), 2, "--size", "Leave it out")
    refused(run("run", one, *asked), 2, "one size", "--size")
    refused(run("run", "model", *asked), 2, "one size", "--size")
    refused(run("run", "nested", "--size", "0.1", "--prompt", "x"), 3, "0.7")


def test_python_offers_what_fits_several_sizes(inside, tmp_path):
    found = sspcompile.load("nested")
    assert isinstance(found, sspcompile.NestedArtifact) and found.sizes == SHARES
    assert found.nested.members[3].share == 0.7 and found.options.nested == OPTIONS["nested"]
    assert found.verify(layerwise=True).parity.same_text
    cut = found.cut(0.75, tmp_path / "cut")
    assert load_mask(cut / "mask.json").size_requested == 0.7 and (cut / "config.json").is_file()
    assert not (cut / "nested.json").exists() and "several" not in (cut / "README.md").read_text()
    model = found.load_model(device="cpu", dtype="float32").model
    assert model.set_size(0.8) == 0.8
    drafted = found.bench_draft(new_tokens=3)
    assert drafted.new_tokens == 3 and 0 <= drafted.acceptance.value <= 1
    for refusing in (
        lambda: found.report,
        lambda: found.mask,
        found.plan,
        found.evaluate,
        found.export,
        found.weigh,
        found.bench,
    ):
        with pytest.raises(InputError, match="several sizes") as told:
            refusing()
        assert "slice --from nested" in told.value.hint
    with pytest.raises(InputError, match="memory as a whole"):
        found.load_model(memory="1GB")
    (foreign := tmp_path / "foreign").mkdir()
    shutil.copytree("nested", foreign, dirs_exist_ok=True)
    (foreign / "model" / "modeling_sspcompile_nested.py").write_text("raise SystemExit")
    with pytest.raises(ArtifactError, match="not run"):
        sspcompile.load(foreign).load_model()


def test_the_model_folder_has_a_card(inside):
    card = Path("nested/model/README.md").read_text()
    smallest = read_nested(Path("nested")).members[-1]
    assert "model.set_size(0.7)" in card and f"| 0.7 | {smallest.parameters:,} |" in card
    assert ModelCard(card).data.pipeline_tag == "text-generation"


def test_verify_finds_a_unit_in_the_wrong_place(run, inside, tmp_path):
    code, text, err = run("verify", "nested", "--layerwise", "--json")
    assert code == 0 and json.loads(text)["layerwise"], err
    from sspcompile.nested.proving import check_order

    nested = read_nested(Path("nested"))
    with pytest.raises(ParityError):
        turned = nested.model_copy(update={"groups": tuple(row[::-1] for row in nested.groups)})
        check_order(open_dense("model").checkpoint, Path("nested/model"), turned.order)


def test_a_damaged_repair_is_not_cut_into_a_member(run, inside, tmp_path):
    shutil.copytree("nested", tmp_path / "nested")
    member = next(one for one in read_nested(Path("nested")).members if one.repair)
    with (tmp_path / "nested" / "model" / member.repair).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    cut = ("slice", "--from", tmp_path / "nested", "--size", member.share, "--out", tmp_path / "cut")
    refused(run(*cut), 2, "not the file that was built")
    assert not (tmp_path / "cut").exists()


def test_an_interrupted_build_went_on_to_the_bytes_of_an_undisturbed_one(inside):
    found = {}

    def progress(stage, done, total):
        if stage == "comparing bytes":  # everything is written, nothing proven
            (model,) = Path().glob(".partial-again-*/.partial-again/model")
            found.update({path.relative_to(model): path.read_bytes() for path in model.rglob("*") if path.is_file()})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build("again", progress)
    assert len(found) > 6 and not Path("again").exists()
    assert all(Path("nested", "model", name).read_bytes() == content for name, content in found.items())
