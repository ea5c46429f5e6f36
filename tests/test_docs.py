"""The documents: no dead link, nothing named that is not there, recipes that can be followed, an example that runs."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import test_criteria
from builders import Shape, family_config, make_checkpoint, save_random
from safetensors.torch import load_file
from test_architecture import ROOMS
from test_slicing_exact import assert_equal_to_masked, mask_for

import sspcompile
from sspcompile.api import build
from sspcompile.checkpoint import Checkpoint, check_manifest, write_manifest
from sspcompile.criteria import Criterion
from sspcompile.criteria.units import CriterionInput
from sspcompile.errors import InputError, OutputExistsError
from sspcompile.families import FAMILIES, table
from sspcompile.model.text import encode
from sspcompile.request.options import NAMES, default_of, flag
from sspcompile.slicing.plan import make_plan
from sspcompile.slicing.write import write_model

REPOSITORY = Path(__file__).parents[1]
# What others write, or runs write, and what git ignores.
NOT_OURS = {"artifacts", "exported", "site", "build", "dist", "node_modules"}


def documents() -> Iterator[Path]:
    for folder, inner, files in os.walk(REPOSITORY):
        top = Path(folder) == REPOSITORY
        inner[:] = [name for name in inner if not name.startswith(".") and not (top and name in NOT_OURS)]
        yield from (Path(folder) / name for name in files if name.endswith(".md"))
    yield from (REPOSITORY / folder / "README.md" for folder in ("artifacts", "exported"))


DOCUMENTS = {path.relative_to(REPOSITORY).as_posix(): path.read_text("utf-8") for path in sorted(documents())}
FENCE = re.compile(r"^(`{3,})[^\n]*\n.*?^\1[ ]*$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(`+)([^`]+?)\1")
CONTRIBUTING, ARCHITECTURE = DOCUMENTS["CONTRIBUTING.md"], DOCUMENTS["docs/architecture.md"]


def prose(text: str) -> str:
    """A document without its code."""
    return SPAN.sub("", FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub and the site name them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} (.+)$", FENCE.sub("", text), flags=re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-")
        found[name] = found.get(name, -1) + 1
    return {name if count == 0 else f"{name}-{count}" for name, many in found.items() for count in range(many + 1)}


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def block(title: str) -> str:
    """A titled block of CONTRIBUTING.md."""
    (found,) = re.findall(rf'^```python title="{re.escape(title)}"\n(.*?)^```$', CONTRIBUTING, re.MULTILINE | re.DOTALL)
    return found


@pytest.mark.parametrize("path", DOCUMENTS)
def test_every_relative_link_and_anchor_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(DOCUMENTS[path])):
        if re.match(r"[a-z]+:", target):
            continue
        place, _, anchor = target.partition("#")
        found = (REPOSITORY / path).parent / place if place else REPOSITORY / path
        assert found.exists(), f"{path} links to {target}"
        if anchor:
            assert anchor in anchors(found.read_text("utf-8")), f"{path} links to {target}"


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.startswith("docs/") or "/" not in path])
def test_every_file_and_target_that_is_named_exists(path):
    """`tests/test_x.py`, `sspcompile/room/module.py`, `room/module.py` and `make target` in a sentence."""
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text("utf-8"), re.MULTILINE))
    planned = {"tests/test_export_single.py"}
    for _, span in SPAN.findall(FENCE.sub("", DOCUMENTS[path])):
        words = span.split()
        if words[0] == "make" and len(words) == 2:
            assert words[1] in targets, f"{path} names {span}"
        elif re.fullmatch(r"[a-z_]+(/[a-z_]+)*/[a-z_]+\.py", span) and span not in planned:
            places = (REPOSITORY / span, REPOSITORY / "sspcompile" / span)
            assert any(place.exists() for place in places), f"{path} names {span}"


def test_the_site_leads_to_every_document_and_names_none_that_is_not_there():
    shown = re.findall(r": (\S+\.md)$", (REPOSITORY / "mkdocs.yml").read_text("utf-8"), flags=re.MULTILINE)
    assert set(shown) <= set(DOCUMENTS)
    assert {path for path in DOCUMENTS if path.startswith("docs/") or "/" not in path} <= set(shown)


def test_the_reference_describes_what_the_library_has():
    named = re.findall(r"^::: (\S+)$", DOCUMENTS["docs/api.md"], flags=re.MULTILINE)
    assert {f"sspcompile.{name}" for name in sspcompile.__all__} - {"sspcompile.__version__"} <= set(named)
    for name in named:
        if name != "sspcompile.errors":
            module, _, member = name.rpartition(".")
            assert hasattr(importlib.import_module(module), member), name


@pytest.mark.parametrize("name", [name for name in NAMES if default_of(name) not in (None, ())])
def test_the_page_of_options_states_every_default(name):
    """Zero is a default too; a switch that is off has none to state."""
    (row,) = re.findall(rf"^\| `{flag(name)}` .*$", DOCUMENTS["docs/options.md"], flags=re.MULTILINE)
    default = default_of(name)
    assert f"| {'' if default is False else f'`{default}`'} |" in row


def test_this_version_has_an_entry_in_the_changelog():
    titles = re.findall(r"^## (\S+)", DOCUMENTS["CHANGELOG.md"], flags=re.MULTILINE)
    assert titles[0] == "Unreleased" and sspcompile.__version__ in titles


def test_the_table_of_rooms_is_the_house():
    rows = re.findall(r"^\| `(\w+)` \|", section(ARCHITECTURE, "Rooms"), flags=re.MULTILINE)
    assert tuple(rows) == ROOMS


def test_the_walk_through_a_build_names_its_steps_in_their_order():
    steps = re.findall(r"^\d+\. `(\w+)`", section(ARCHITECTURE, "What happens in a build"), flags=re.MULTILINE)
    (body,) = (
        node
        for node in ast.parse(Path(build.__file__).read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == "build"
    )
    calls = [node for node in ast.walk(body) if isinstance(node, ast.Call)]
    calls.sort(key=lambda node: (node.lineno, node.col_offset))
    names = [node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id for node in calls]
    assert steps == [name for name in names if name in steps] and len(steps) == 10


def test_the_criterion_of_the_recipe_scores_what_the_recipe_says(tmp_path):
    source = block("sspcompile/criteria/write_energy.py")
    formula: dict = {}
    exec(compile(source, "write_energy.py", "exec"), formula)
    loaded = test_criteria.constant_model()
    found = formula["write_energy"](loaded, CriterionInput(encode(loaded, ["war", "tell me about acid ?"]), 2))
    stated = re.search(r'`"write-energy": \[(\d+) \+ (\d+), (\d+) \+ (\d+)\]`', CONTRIBUTING)
    a, b, c, d = map(float, stated.groups())
    np.testing.assert_allclose(found, [[a + b, c + d]], rtol=1e-4)
    row = eval(block("sspcompile/criteria/table.py"), {"Criterion": Criterion})
    assert row.name == "write-energy" and row.place == "write_energy.write_energy"


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_the_family_of_the_recipe_is_cut_exactly(layout, tmp_path, monkeypatch):
    row = eval(block("a row of FAMILIES"), vars(table))
    ((name, settings),) = ast.literal_eval(block("a row of FAMILY_SETTINGS")).items()
    assert name == row.model_type
    monkeypatch.setitem(FAMILIES, name, row)
    monkeypatch.setitem(importlib.import_module("builders").FAMILY_SETTINGS, name, settings)
    source = save_random(tmp_path / "dense", family_config(name, bias=True), seed=1)
    checkpoint = Checkpoint(source)
    mask = mask_for(checkpoint, 0.6, layout, 3)
    plan = make_plan(checkpoint, mask)
    write_model(checkpoint, plan, tmp_path / "cut")
    assert_equal_to_masked(source, tmp_path / "cut", mask, custom=plan.custom_code)


def test_the_export_format_of_the_recipe_writes_every_tensor_into_one_file(tmp_path):
    code: dict = {}
    exec(compile(block("sspcompile/export/single.py"), "single.py", "exec"), code)
    artifact, out = tmp_path / "artifact", tmp_path / "out"
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "dense", Shape(layers=3, shard_bytes=10_000)))
    write_model(checkpoint, make_plan(checkpoint, mask_for(checkpoint, 0.6, "per-layer", 3)), artifact / "model")
    write_manifest(artifact, {})
    manifest = code["export_single"](artifact, out)
    assert manifest.files.keys() == check_manifest(out).files.keys()
    shards = [load_file(path) for path in (artifact / "model").glob("*.safetensors")]
    wanted, found = {k: v for shard in shards for k, v in shard.items()}, load_file(out / "model.safetensors")
    assert len(shards) > 1 and wanted.keys() == found.keys() and all(found[k].equal(v) for k, v in wanted.items())
    with pytest.raises(OutputExistsError):
        code["export_single"](artifact, out)
    with pytest.raises(InputError, match="inside"):
        code["export_single"](artifact, artifact / "out")


@pytest.mark.whole
def test_the_example_runs_and_finds_its_build_again(tmp_path):
    ran = [
        subprocess.run(
            [sys.executable, REPOSITORY / "docs" / "example.py"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            check=False,
        )
        for _ in range(2)
    ]
    assert [done.returncode for done in ran] == [0, 0], ran[0].stderr + ran[1].stderr
    assert "same text: True" in ran[0].stdout and (tmp_path / "exported/sums-onnx/model.onnx").is_file()
    assert ran[0].stdout == ran[1].stdout, "the second sitting opens the build of the first"
