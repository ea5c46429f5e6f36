"""The house: rooms build on each other in one direction, and none of them is too large to be read."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sspcompile"
# From the ground up: a room imports from itself and from rooms before it (docs/architecture.md).
ROOMS = (
    "errors",
    "progress",
    "startup",
    "machine",
    "intervals",
    "families",
    "embedded",
    "checkpoint",
    "workspace",
    "request",
    "model",
    "criteria",
    "prepare",
    "slicing",
    "repair",
    "select",
    "proof",
    "trimming",
    "nested",
    "export",
    "evaluate",
    "bench",
    "report",
    "api",
    "cli",
)
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
LONGEST_MODULE, LONGEST_FUNCTION = 400, 60


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of everything that a file takes from the package, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "sspcompile":
            for alias in node.names:
                yield module_of(f"{node.module}.{alias.name}"), alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("sspcompile."):
                    yield alias.name, ""


def module_of(dotted: str) -> str:
    while dotted not in MODULES:
        dotted = dotted.rpartition(".")[0]
    return dotted


def room_of(module: str) -> str:
    return ([*module.split("."), ""])[1]


def test_every_room_is_known():
    assert {room_of(module) for module in MODULES} - {""} == set(ROOMS)


@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module)])
def test_a_module_imports_from_its_own_room_and_from_those_below(module):
    for place, name in imported(MODULES[module]):
        own, other = room_of(module), room_of(place)
        if other and other != own:
            assert ROOMS.index(other) < ROOMS.index(own), f"{module} imports {place}"
            assert not name.startswith("_"), f"{module} imports {name}, which is private to {place}"


def test_no_modules_import_each_other_in_a_circle():
    edges = {module: {place for place, _ in imported(path)} - {module} for module, path in MODULES.items()}
    edges.pop("sspcompile")  # lends its names lazily
    while free := [module for module, below in edges.items() if not below & set(edges)]:
        for module in free:
            del edges[module]
    assert not edges, f"a circle among {sorted(edges)}"


@pytest.mark.parametrize("path", MODULES.values(), ids=MODULES)
def test_what_must_be_read_at_once_fits_on_a_few_screens(path):
    text = path.read_text("utf-8")
    assert text.count("\n") <= LONGEST_MODULE, path
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{path}: {node.name} has {length} lines"


def modules_loaded_by(code: str) -> set[str]:
    listed = f"import sys\n{code}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import sspcompile",
        "import sspcompile; dir(sspcompile)",
        "import sspcompile; sspcompile.plan(keep=0.8)",
        "from sspcompile.cli.main import cli",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code):
    heavy = {"torch", "transformers", "onnxruntime", "matplotlib", "sklearn"}
    assert not heavy & modules_loaded_by(code)
