"""What a command writes replaces nothing that it reads, and nothing that sspcompile did not write."""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from builders import Shape, make_checkpoint
from test_slicing_exact import mask_for

import sspcompile
from sspcompile.checkpoint import Checkpoint, fingerprint, staged, write_manifest
from sspcompile.errors import InputError, OutputExistsError
from sspcompile.slicing.mask import dump_mask

RECIPE = "schema_version: 1\nname: asked\ndescription: Sums.\nscenario: {prompts_file: in-made/asked.txt}\n"
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "made", "r": 4}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """`made` is a model as `slice`, `trim` and `export` write one, `par/a` a build, `par` and `in-made` hold what is
    read and have a manifest, as an artifact that somebody put it into.
    """
    home = tmp_path_factory.mktemp("good")
    make_checkpoint(home / "made", Shape())
    checkpoint = Checkpoint(home / "made")
    mask = dump_mask(replace(mask_for(checkpoint, 0.5, "uniform", 3), model=fingerprint(checkpoint)))
    write_manifest(home / "made", {})
    shutil.copytree(home / "made", home / "par" / "a" / "model")
    (home / "mask.json").write_text(mask)
    (home / "par" / "a" / "mask.json").write_text(mask)
    write_manifest(home / "par" / "a", {})
    write_manifest(home / "par", {})
    for name in ("asked.txt", "m.gguf", "mask.json", "pools/breads.yaml", "adapter/adapter_config.json"):
        (home / "in-made" / name).parent.mkdir(parents=True, exist_ok=True)
        (home / "in-made" / name).write_text(mask if name == "mask.json" else "How much is 1 + 1?\nAnd 2 + 2?\n")
    (home / "in-made" / "adapter" / "adapter_config.json").write_text(json.dumps(ADAPTER))
    (home / "in-made" / "asked.yaml").write_text(RECIPE.replace("in-made/", ""))
    write_manifest(home / "in-made", {})
    (home / "asked.yaml").write_text(RECIPE)
    shutil.copyfile(home / "in-made" / "asked.txt", home / "asked.txt")
    return home


@pytest.fixture
def home(good, tmp_path, monkeypatch) -> Path:
    shutil.copytree(good, tmp_path / "home", symlinks=True)
    (tmp_path / "link").symlink_to(tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


BUILD = ("build", "--scenario", "asked.txt", "--model")
SLICE = ("slice", "--mask", "mask.json", "--model")
TRIM = ("trim", "--scenario", "asked.txt", "--model")
EXPORT = ("export", "--format", "onnx")
ONTO = {
    "a build onto its model": (*BUILD, "made", "--out", "made"),
    "a build into its model": (*BUILD, "made", "--out", "made/cut"),
    "a build onto what holds its model": (*BUILD, "par/a/model", "--out", "par"),
    "by a link": (*BUILD, "made", "--out", "../link/made"),
    "a model by a link": (*BUILD, "../link/made", "--out", "made"),
    "by a way around": (*BUILD, "made/../made", "--out", "par/../made"),
    "a nested build": (*BUILD, "made", "--nested", "1,0.8", "--out", "made"),
    "a build of a sweep": (*BUILD, "par/a/model", "--sweep", "keep=0.5,1", "--out", "par/a/model"),
    "a build onto its prompts": ("build", "--scenario", "in-made/asked.txt", "--out", "in-made"),
    "a build onto its recipe": ("build", "--scenario", "in-made/asked.yaml", "--out", "in-made"),
    "a build onto the prompts of its recipe": ("build", "--scenario", "asked.yaml", "--out", "in-made"),
    "a build onto its pools": (*BUILD, "made", "--pools", "in-made/pools", "--out", "in-made"),
    "a build onto an adapter": (*BUILD, "in-made/adapter", "--out", "in-made"),
    "a build onto the base of an adapter": (*BUILD, "in-made/adapter", "--out", "made"),
    "a build onto a GGUF file": (*BUILD, "in-made/m.gguf", "--out", "in-made"),
    "a cut onto its model": (*SLICE, "made", "--out", "made"),
    "a cut into its model": (*SLICE, "made", "--out", "made/cut"),
    "a cut onto the build around its model": (*SLICE, "par/a/model", "--out", "par/a"),
    "a cut onto its mask": ("slice", "--mask", "in-made/mask.json", "--model", "made", "--out", "in-made"),
    "a trimmed model onto its model": (*TRIM, "made", "--out", "made"),
    "a trimmed model onto what holds its model": (*TRIM, "par/a/model", "--out", "par/a"),
    "a trimmed model onto its prompts": ("trim", "--scenario", "in-made/asked.txt", "--out", "in-made"),
    "an ONNX export onto its model": (*EXPORT, "--model", "made", "--out", "made"),
    "an ONNX export into its model": (*EXPORT, "--model", "made", "--out", "made/onnx"),
    "an ONNX export onto its build": (*EXPORT, "par/a", "--out", "par/a"),
    "a GGUF export onto what holds its build": ("export", "par/a", "--format", "gguf", "--out", "par"),
    "a Hugging Face export onto its build": ("export", "par/a", "--out", "par/a"),
    "a Hugging Face export onto what holds its build": ("export", "par/a", "--out", "par"),
}


@pytest.mark.parametrize("case", ONTO)
def test_output_never_replaces_what_the_command_reads(case, run, home):
    before = contents(home)
    code, out, err = run(*ONTO[case], "--overwrite")
    assert code == 2 and out == "" and err.startswith("Error: ") and err.count("\n") == 1, err
    assert "which the command reads" in err or "is what the command reads" in err
    assert "another --out" in err or "--out outside" in err
    assert contents(home) == before


def test_a_model_that_was_cloned_takes_a_folder_of_builds_and_in_python_prompts_are_kept_too(run, home, monkeypatch):
    make_checkpoint(home / "cloned", Shape())
    monkeypatch.chdir(home / "cloned")
    code, _, err = run("slice", "--mask", "../mask.json", "--model", ".", "--any-model", "--out", "artifacts/cut")
    assert code == 0 and (home / "cloned" / "artifacts" / "cut" / "config.json").exists(), err
    monkeypatch.chdir(home)
    before = contents(home)
    for write in (sspcompile.build, sspcompile.trim):
        for scenario in ("in-made/asked.txt", Path("in-made/asked.txt"), "in-made/asked.yaml"):
            with pytest.raises(InputError, match="which the command reads"):
                write("cloned", scenario, out="in-made", overwrite=True)
    assert contents(home) == before


def test_a_folder_in_another_programs_takes_builds_and_a_build_is_repeated_from_its_own_recipe(run, home, monkeypatch):
    make_checkpoint(home / "project", Shape())
    (home / "project" / "manifest.json").write_text('{"name": "App"}')
    monkeypatch.chdir(home / "project")
    code, _, err = run("slice", "--mask", "../mask.json", "--model", ".", "--any-model", "--out", "artifacts/cut")
    assert code == 0, err
    monkeypatch.chdir(home)
    (home / "par" / "a" / "recipe.yaml").write_text(
        RECIPE.replace("{prompts_file: in-made/asked.txt}", "{text: Sums.}")
    )
    write_manifest(home / "par" / "a", {})
    again = (
        "build",
        "--scenario",
        "par/a/recipe.yaml",
        "--model",
        "made",
        "--out",
        "par/a",
        "--overwrite",
        "--dry-run",
    )
    code, _, err = run(*again)
    assert code == 0, err
    assert run(*again[:-2], "--dry-run")[0] == 2, "unasked it is kept"


def test_names_that_differ_in_case_are_told_apart_by_the_file_system(home):
    (home / "Made").symlink_to(home / "made")  # one folder under two names, as where case does not count
    with pytest.raises(InputError, match="lies inside"), staged(home / "Made" / "x", reads=[home / "made"]):
        pytest.fail("work was begun")


def test_a_model_of_links_is_not_replaced_where_they_lead(home):
    (home / "linked").mkdir()
    for path in (home / "made").iterdir():
        (home / "linked" / path.name).symlink_to(path)
    with pytest.raises(InputError, match="holds linked"), staged(Path("made"), overwrite=True, reads=[Path("linked")]):
        pytest.fail("work was begun")


def test_a_cut_beside_its_model_is_written_and_written_again(run, home):
    for _ in range(2):
        assert run(*SLICE, "made", "--out", "cut", "--overwrite", "-q")[0] == 0
    assert run(*SLICE, "made", "--out", "made-smaller", "-q")[0] == 0
    assert run(*SLICE, "made", "--out", "par/b", "-q")[0] == 0


@pytest.mark.parametrize("room", ["api", "export"])
def test_whatever_publishes_says_what_it_reads(room):
    """A new command that publishes a folder has to name its sources, or this fails."""
    for path in (Path(sspcompile.__file__).parent / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "staged":
                assert "reads" in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}"


# --- What sspcompile did not write -----------------------------------------------------------------------------------


def kept(out: Path, *named: str) -> None:
    before = contents(out)
    with pytest.raises(OutputExistsError) as caught, staged(out, overwrite=True):
        pytest.fail("work was begun")
    assert "did not write" in str(caught.value) and "another --out" in str(caught.value)
    assert all(name in str(caught.value) for name in named), caught.value
    assert contents(out) == before


@pytest.mark.parametrize(
    "manifest",
    [
        '{"name": "An app", "icons": []}',
        '{"schema_version": 1, "files": ["index.html"], "origin": {}}',
        '{"schema_version": 7, "files": {}, "origin": {}}',
        "[]",
        "{",
    ],
)
def test_a_manifest_of_another_program_marks_nothing_as_ours(manifest, tmp_path):
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_text(manifest)
    kept(tmp_path / "app", "manifest.json")


def artifact(out: Path) -> Path:
    with staged(out) as folder:
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
        (folder / "report.json").write_text("{}")
        write_manifest(folder, {})
    return out


@pytest.mark.parametrize("name", ["notes.txt", "model/notes.txt", "mine/deep/notes.txt", "model/bench.json"])
def test_a_file_that_somebody_put_into_an_artifact_is_kept_and_named(name, tmp_path):
    out = artifact(tmp_path / "out")
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("mine")
    kept(out, name)
    (out / name).unlink()
    (out / name).symlink_to("nowhere")
    kept(out, name)


def test_what_the_tool_and_the_system_add_to_an_artifact_goes_with_it(tmp_path):
    out = artifact(tmp_path / "out")
    system = ("model/.DS_Store", "._mask.json", "model/.nfs0001", ".ipynb_checkpoints/report.md", ".recipe.yaml.swp")
    for name in ("bench.json", "report.html", "mask.svg", ".partial-bench.json-abcdefgh/lock", *system):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("later")
    with staged(out, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in out.iterdir()] == ["new"]


def test_a_toolkit_is_replaced_damaged_or_not_and_only_where_nothing_lies_beside_it(tmp_path):
    out = tmp_path / "toolkit"
    out.mkdir()
    (out / "toolkit.json").write_text("{")
    (out / "notes.txt").write_text("mine")
    kept(out)
    (out / "notes.txt").unlink()
    with staged(out, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in out.iterdir()] == ["new"]


# --- Pictures and empty paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("svg", ["par/a/manifest.json", "par/a/new.svg", "par/a/model/new.svg", "../link/par/a/x.svg"])
def test_a_picture_is_never_written_into_the_artifact(svg, run, home):
    before = contents(home)
    code, out, err = run("inspect", "par/a", "--svg", svg, "--overwrite")
    assert code == 2 and out == "" and "lies inside par/a" in err and "--svg" in err
    assert contents(home) == before


def test_a_picture_replaces_pictures_alone(run, home):
    code, _, err = run("inspect", "par/a", "--svg", "asked.txt", "--overwrite")
    assert code == 2 and "asked.txt is not an .svg file" in err and "--svg" in err
    for more in ((), ("--overwrite",)):
        assert run("inspect", "par/a", "--svg", "map.svg", *more)[0] == 0
    assert "Replace FILE if it exists." in run("inspect", "--help")[1]


@pytest.mark.parametrize(
    "words",
    [
        (*BUILD, "made", "--out", ""),
        (*SLICE, "made", "--out", ""),
        ("slice", "--mask", "", "--out", "cut"),
        (*TRIM, "made", "--out", ""),
        (*EXPORT, "--model", "made", "--out", ""),
        ("compare", "par/a", "--out", ""),
        ("inspect", "par/a", "--svg", ""),
    ],
    ids=" ".join,
)
def test_an_empty_path_is_not_the_current_folder(words, run, home):
    code, out, err = run(*words)
    assert (code, out) == (2, "") and "is empty" in err and err.count("\n") == 1, err
