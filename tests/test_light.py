"""What needs no torch: it does not wait for it, and runs where it is not to be had (`make test-pythons`)."""

from __future__ import annotations

import importlib
import json
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import sspcompile
from sspcompile.checkpoint import Checkpoint, embedded_model
from sspcompile.families import geometry_of
from sspcompile.slicing.mask import HeadMask, dump_mask, kept_of

HEAVY = ("torch", "transformers", "sklearn", "scipy", "matplotlib", "onnx", "onnxruntime", "accelerate")
# Rooms, and modules of rooms, whose business is done without a model.
LIGHT = (
    "errors",
    "progress",
    "startup",
    "machine",
    "intervals",
    "families",
    "checkpoint",
    "workspace",
    "request",
    "cli",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A mask for the embedded model, alone and as what `inspect` takes for an artifact."""
    home = tmp_path_factory.mktemp("home")
    g = geometry_of(json.loads((embedded_model() / "config.json").read_text()))
    kept = np.zeros((g.layers, g.heads), dtype=bool)
    for layer in range(g.layers):
        kept[layer, : g.heads if layer % 2 else g.heads // 2] = True
    scores = tuple(map(tuple, np.random.default_rng(1).random((g.layers, g.heads)).tolist()))
    rows = kept_of(kept)
    mask = HeadMask("", g.layers, g.heads, g.kv_heads, rows, "per-layer", 0.75, 0.75, scores, (), "random", {})
    (home / "mask.json").write_text(dump_mask(mask))
    (home / "artifacts" / "made" / "model").mkdir(parents=True)
    shutil.copyfile(embedded_model() / "config.json", home / "artifacts" / "made" / "model" / "config.json")
    (home / "artifacts" / "made" / "mask.json").write_text(dump_mask(mask))
    (home / "artifacts" / "last").write_text("made\n")
    return home


def finish(home: Path, *words: str) -> tuple[int, str, list[str]]:
    """Exit code, standard error, and which of the heavy libraries the command imported."""
    code = (
        "import sys\nfrom sspcompile.cli.main import main\ntry:\n    main(sys.argv[1:])\n"
        f"finally:\n    print(sorted(set({HEAVY}) & set(sys.modules)), file=sys.__stdout__)\n"
    )
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr, json.loads(done.stdout.splitlines()[-1].replace("'", '"'))


@pytest.mark.parametrize(
    "words",
    [
        ("--version",),
        ("--help",),
        ("build", "--help"),
        ("criteria",),
        ("recipe", "ls"),
        ("recipe", "show", "finance-desk"),
        ("plan", "--keep", "0.5"),
        ("plan", "--model", str(embedded_model()), "--json"),
        ("slice", "--mask", "mask.json", "--any-model", "--out", "cut"),
        ("inspect",),
        ("inspect", "--json"),
        ("inspect", "artifacts/made", "--svg", "map.svg"),
        ("plan", "--model", "nowhere"),
        ("slice", "--mask", "nowhere.json", "--out", "cut2"),
    ],
    ids=" ".join,
)
def test_commands_that_run_no_model_do_not_wait_for_torch(words, home):
    code, err, imported = finish(home, *words)
    assert imported == [], err
    assert code == (2 if any("nowhere" in word for word in words) else 0), err


def test_a_cut_without_torch_has_the_rows_of_the_kept_heads(home):
    code, err, _ = finish(home, "slice", "--mask", "mask.json", "--any-model", "--out", "rows")
    assert code == 0, err
    dense, cut = Checkpoint(embedded_model()), load_file(home / "rows" / "model.safetensors")
    mask = json.loads((home / "mask.json").read_text())
    size = dense.geometry.head_dim
    for layer, heads in enumerate(mask["kept"]):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        whole = np.concatenate([dense.read_rows(name, head * size, (head + 1) * size) for head in heads])
        assert cut[name].tobytes() == whole.tobytes()


def test_every_light_module_can_be_imported():
    seen = 0
    for room in LIGHT:
        module = importlib.import_module(f"sspcompile.{room}")
        seen += 1
        for found in pkgutil.iter_modules(getattr(module, "__path__", ())):
            importlib.import_module(f"{module.__name__}.{found.name}")
            seen += 1
    assert seen > len(LIGHT)


def test_the_package_says_that_it_is_typed():
    assert (Path(sspcompile.__file__).parent / "py.typed").is_file()
