"""From what is typed after `--model` to a folder: names of the hub with a revision, and folders of a hub cache."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from builders import family_config, save_random
from hub import REVISION, ask, commit_of, hub
from refusals import refused
from test_slicing_exact import mask_for

from sspcompile.checkpoint import Checkpoint, fingerprint
from sspcompile.errors import CheckpointError, InputError, RecipeError
from sspcompile.model.dense import open_dense
from sspcompile.request.resolving import resolve
from sspcompile.slicing.mask import dump_mask

# As little work as a build can do.
QUICK = ("--criterion", "magnitude", "--repair", "none", "--max-tokens", 16, "--continuation-tokens", 0, "--keep", 0.5)
BUILD = ("build", "--scenario", "chemistry-helpdesk", *QUICK, "-q")
BUILD_SENTENCE = ("build", "--scenario", "Questions about chemistry", *QUICK, "-q")


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return save_random(tmp_path_factory.mktemp("dense") / "model", family_config("llama", layers=2))


@pytest.fixture(scope="module")
def older(tmp_path_factory) -> Path:
    return save_random(tmp_path_factory.mktemp("older") / "model", family_config("llama", layers=2), seed=7)


@pytest.fixture
def run(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return run


def mask_of(folder: Path, path: Path) -> Path:
    checkpoint = Checkpoint(folder)
    path.write_text(dump_mask(replace(mask_for(checkpoint, 0.5, "uniform", 3), model=fingerprint(checkpoint))))
    return path


def origin_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())["origin"]


# --- Revisions -------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Called with an address, or None for offline: from then on that is the hub, and its cache lies here."""

    return lambda address: ask(monkeypatch, address, tmp_path / "hub")


@pytest.fixture
def tiny(dense, older, home) -> Iterator[None]:
    """A hub whose `org/tiny` has `older` as v1."""
    with hub("org/tiny", dense, v1=older) as (address, _):
        home(address)
        yield


def test_revision_is_what_is_cut_and_what_verify_finds_again(tiny, home, run, older, tmp_path):
    mask = mask_of(older, tmp_path / "mask.json")
    assert run("slice", "--mask", mask, "--model", "org/tiny", "--revision", "v1", "--out", "cut")[0] == 0
    told = origin_of(tmp_path / "cut")
    assert told["source"] == fingerprint(Checkpoint(older))
    assert (told["source_name"], told["source_revision"]) == ("org/tiny", commit_of("v1"))
    assert run("verify", "cut", "--layerwise")[0] == 0
    # The branch of before is another model: the mask is not of it, and the cut was not made from it.
    other = run("slice", "--mask", mask, "--model", "org/tiny", "--out", "other")
    assert other[0] == 2 and "another model" in other[2], other
    other = run("verify", "cut", "--model", "org/tiny")
    assert other[0] == 2 and "org/tiny is not the model" in other[2], other
    # The same in one word, which every option and argument takes that names a model.
    assert run("slice", "--mask", mask, "--model", "org/tiny@v1", "--out", "again")[0] == 0
    assert origin_of(tmp_path / "again") == told
    assert run("verify", "cut", "--layerwise", "--model", "org/tiny", "--revision", "v1")[0] == 0
    home(None)
    assert run("verify", "cut", "--layerwise")[0] == 0


def test_branch_that_moves_on_does_not_take_an_artifact_along(home, run, dense, older, tmp_path):
    """Without a revision, too, the commit is written down: the branch of today is another model tomorrow."""
    mask = mask_of(dense, tmp_path / "mask.json")
    with hub("org/tiny", dense) as (address, _):
        home(address)
        assert run("slice", "--model", "org/tiny", "--mask", mask, "--out", "cut")[0] == 0
    assert origin_of(tmp_path / "cut")["source_revision"] == REVISION
    with hub("org/tiny", dense, v1=older) as (address, _):
        home(address)
        (tmp_path / "hub" / "models--org--tiny" / "refs" / "main").write_text(commit_of("v1"))
        assert run("verify", "cut", "--layerwise")[0] == 0


@pytest.mark.whole
def test_build_of_a_revision_says_so_and_is_measured_against_it(tiny, home, run, older, tmp_path, monkeypatch):
    monkeypatch.setenv("SSPCOMPILE_MODEL", "org/tiny")
    monkeypatch.setenv("SSPCOMPILE_REVISION", "v1")
    assert run(*BUILD, "--out", "built")[0] == 0
    assert origin_of(tmp_path / "built")["source_revision"] == commit_of("v1")
    report = json.loads((tmp_path / "built" / "report.json").read_text())
    assert report["model"] == "org/tiny@v1" and report["origin"]["source"] == fingerprint(Checkpoint(older))
    recipe = (tmp_path / "built" / "recipe.yaml").read_text()
    assert "model: org/tiny\n" in recipe and "revision: v1\n" in recipe
    assert "base_model: org/tiny\n" in (tmp_path / "built" / "model" / "README.md").read_text()
    monkeypatch.delenv("SSPCOMPILE_MODEL")
    monkeypatch.delenv("SSPCOMPILE_REVISION")
    home(None)
    for command in (("verify", "built"), ("eval", "built", "--items", 2, "--max-new-tokens", 2)):
        done = run(*command, "-q")
        assert done[0] == 0, done
    # The recipe in the artifact asks for the same again.
    assert run("build", "--scenario", "built/recipe.yaml", "--dry-run", "--out", "again") == (0, recipe, "")


@pytest.mark.parametrize("command", [("plan", "--keep", 0.5), ("prepare",), ("export", "--format", "onnx")])
def test_revision_that_is_not_there_is_named(command, tiny, home, run):
    refused(run(*command, "--model", "org/tiny", "--revision", "v9"), "org/tiny has no revision v9 on the hub")
    home(None)
    refused(run(*command, "--model", "org/tiny@v9"), "offline", "revision v9 of org/tiny")


def test_export_of_a_revision_names_it(tiny, run, older, tmp_path):
    assert run("export", "--format", "onnx", "--model", "org/tiny", "--revision", "v1")[0] == 0
    told = origin_of(tmp_path / "exported" / "tiny-onnx")
    assert (told["source_name"], told["source_revision"]) == ("org/tiny", commit_of("v1"))
    assert told["source"] == fingerprint(Checkpoint(older))


@pytest.mark.parametrize("revision", ["", "../../x", "a b", "..", "/x", "x//y", "-x"])
def test_revision_that_is_no_name_reaches_neither_hub_nor_disk(revision, run, tmp_path):
    refused(run("plan", "--model", f"org/tiny@{revision}", "--keep", 0.5), "is not a revision", "org/tiny")


@pytest.mark.parametrize(
    "command", [("plan", "--keep", 0.5), ("prepare",), ("slice", "--mask", "m", "--out", "x"), BUILD_SENTENCE]
)
def test_revision_of_what_has_none_is_refused(command, dense, run):
    refused(run(*command, "--model", dense, "--revision", "v1"), "for a model of the hub", f"{dense} is none")
    refused(run(*command, "--model", "embedded", "--revision", "v1"), "embedded is none", "hub name")
    refused(run(*command, "--revision", "v1"), "no model is named", "--model")
    refused(run(*command, "--model", "a/b@v1", "--revision", "v2"), "a/b@v1 names its revision", "'v2'")


def test_folder_comes_before_a_revision(dense, tmp_path, monkeypatch):
    """What lies here is not looked for elsewhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "tiny@v1").symlink_to(dense)
    assert open_dense("org/tiny@v1").place == str(tmp_path / "org" / "tiny@v1")


def test_revision_goes_with_the_model_that_it_stands_with():
    recipe = {"model": "org/tiny", "revision": "v1"}
    other = resolve({"model": "org/other"}, environment={"SSPCOMPILE_REVISION": "v2"}, recipe=recipe)
    assert (other.model, other.revision) == ("org/other", None)
    newer = resolve({"revision": "v2"}, environment={}, recipe=recipe)
    assert newer.source == "org/tiny@v2"
    assert resolve({}, environment={}, recipe=recipe).source == "org/tiny@v1"
    with pytest.raises(InputError, match="for a model of the hub"):
        _ = resolve({"revision": "v1"}, environment={}).source
    with pytest.raises(RecipeError):
        resolve({"revision": " "}, environment={})


# --- Hub caches ------------------------------------------------------------------------------------------------------


def cached(model: Path, root: Path, commit: str = REVISION, *, main: bool = True) -> Path:
    """The same folder as a hub cache keeps it: every file a link into the store of its repository."""
    folder = root / "snapshots" / commit
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    for path in sorted(path for path in model.rglob("*") if path.is_file()):
        link = folder / path.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = root / "blobs" / f"{commit[:8]}{path.name.encode().hex()}"
        blob.write_bytes(path.read_bytes())
        link.symlink_to(os.path.relpath(blob, link.parent))
    if main:
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / "main").write_text(commit)
    return folder


def plain_files(folder: Path) -> bool:
    return not [path for path in folder.rglob("*") if path.is_symlink()]


@pytest.mark.whole
def test_every_command_takes_a_snapshot_and_writes_plain_files(dense, run, tmp_path):
    model = cached(dense, tmp_path / "hub" / "models--org--tiny")
    assert run("plan", "--model", model, "--keep", 0.5)[0] == 0
    assert run(*BUILD, "--model", model, "--out", "built")[0] == 0
    assert run("verify", "built", "--layerwise")[0] == 0
    assert run("export", "built", "--out", "exported-hf")[0] == 0
    assert run("export", "--format", "onnx", "--model", model, "--hard-link", "--out", "exported-onnx")[0] == 0
    assert [name for name in ("built", "exported-hf", "exported-onnx") if not plain_files(tmp_path / name)] == []
    assert origin_of(tmp_path / "built")["source"] == fingerprint(Checkpoint(dense))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "built" / "model" / name).read_bytes() == (dense / name).read_bytes()


@pytest.mark.parametrize("options", [(), ("--hard-link", "--max-shard-size", "20KB"), ("--hard-link",)])
@pytest.mark.parametrize("given", ["snapshot", "repository", "link to the snapshot"])
def test_cut_of_a_hub_cache_is_that_of_the_folder(given, options, dense, run, tmp_path):
    repository = tmp_path / "hub" / "models--org--tiny"
    folder = cached(dense, repository)
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    model = {"snapshot": folder, "repository": repository, "link to the snapshot": tmp_path / "link"}[given]
    mask = mask_of(dense, tmp_path / "mask.json")
    for source, out in ((model, "linked"), (dense, "plain")):
        assert run("slice", "--model", source, "--mask", mask, "--out", out, *options)[0] == 0
    assert plain_files(tmp_path / "linked")
    first, second = ({f.name: f.read_bytes() for f in (tmp_path / out).iterdir()} for out in ("linked", "plain"))
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] in (
        ["manifest.json"],
        ["README.md", "manifest.json"],
    )


def test_repository_of_a_hub_cache_stands_for_its_main(dense, older, run, tmp_path):
    root = tmp_path / "models--org--tiny"
    main = cached(dense, root, "b" * 40)
    other = cached(older, root, "f" * 40, main=False)
    found = open_dense(str(root))
    assert found.fingerprint == fingerprint(Checkpoint(dense)) and found.place == str(main)
    # Without a branch that says which, both are named.
    (root / "refs" / "main").unlink()
    refused(run("plan", "--model", root, "--keep", 0.5), "hub cache of 2 revisions", str(main), str(other))
    refused(run("export", root, "--format", "onnx"), "hub cache of 2 revisions", str(main), str(other))
    # A branch whose snapshot is gone says nothing.
    (root / "refs" / "main").write_text("c" * 40)
    refused(run("plan", "--model", root, "--keep", 0.5), "hub cache of 2 revisions", str(main), str(other))


def test_folder_with_a_model_is_that_model_whatever_its_snapshots_are(dense, older, tmp_path):
    """Training leaves folders of this name, too."""
    (tmp_path / "model").mkdir()
    for file in dense.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model" / "snapshots").mkdir()
    (tmp_path / "model" / "snapshots" / "step-1").symlink_to(older)
    assert open_dense(str(tmp_path / "model")).fingerprint == fingerprint(Checkpoint(dense))


@pytest.mark.parametrize("file", ["../../blobs/weights", "/etc/passwd", "../weights.safetensors", 7])
def test_index_that_leaves_a_snapshot_stays_refused(file, dense, tmp_path):
    folder = cached(dense, tmp_path / "models--org--tiny")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": file}}))
    with pytest.raises(CheckpointError, match="Shards must lie in the model folder itself"):
        open_dense(str(folder))
