"""The wheel in an environment that holds nothing else, run from a folder that is not the repository."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_wheel_builds_a_smaller_model_from_any_folder(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    run(*pip, "wheel", "--no-deps", "-w", tmp_path / "dist", REPOSITORY, cwd=tmp_path)
    wheel = next((tmp_path / "dist").glob("sspcompile-*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "sspcompile/embedded/model/model.safetensors",
        "sspcompile/embedded/questions.jsonl",
        "sspcompile/recipes/domains/chemistry.yaml",
        "sspcompile/recipes/scenarios/homework-tutor.yaml",
        "sspcompile/recipes/scenarios/prompts/homework-tutor.jsonl",
        "sspcompile/embedded/domains/outside/sports.yaml",
        "sspcompile/embedded/scenarios/chemistry-helpdesk.yaml",
        "sspcompile/slicing/modeling_sspcompile.py",
        "sspcompile/nested/modeling_sspcompile_nested.py",
        "sspcompile/report/template.html",
        "sspcompile/export/card.md",
    ):
        assert needed in names
    assert not [name for name in names if name.startswith(("training/", "tests/", "benchmarks/"))]
    modules = {name for name in names if name.startswith("sspcompile/embedded/") and name.endswith(".py")}
    assert modules == {"sspcompile/embedded/__init__.py", "sspcompile/embedded/questions.py"}
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "-q", "install", "--constraint", REPOSITORY / "constraints.txt", wheel, cwd=tmp_path)
    command = tmp_path / "venv" / "bin" / "sspcompile"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    report = json.loads(run(command, "build", "--scenario", "math-tutor", "--json", cwd=elsewhere))
    assert report["budget"]["max_loss"] and report["budget"]["keep_achieved"] < 1
    run(command, "export", cwd=elsewhere)
    run(command, "verify", cwd=elsewhere)
    asked = json.loads(run(command, "eval", "--items", "12", "--json", cwd=elsewhere))
    assert asked["dense"]["exact_match"] > 0.5
    bench = json.loads(run(command, "bench", "--quick", "--json", cwd=elsewhere))
    assert {contender["name"] for contender in bench["contenders"]} == {"dense", "sliced"}
