"""Every command of the README, run in its order in one empty folder; every Python snippet, after them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from builders import family_config, save_random
from transformers import AutoTokenizer

from benchmarks.quality_tables import DOCUMENTS, RESULTS, summarised
from sspcompile.criteria import CRITERIA
from sspcompile.embedded import MODEL_DIR, SCENARIOS_DIR
from sspcompile.request.recipe import shipped_recipes

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text("utf-8")
# Installing is what `make test-wheel` does, in an environment of its own; vLLM is no dependency of the tests.
NOT_RUN = ("pip install", "make ", "vllm ")
# Short texts and a given budget, which random weights need: what is tested is that the commands run.
SHORT = {"SSPCOMPILE_CONTINUATION_TOKENS": "2", "SSPCOMPILE_MAX_TOKENS": "48", "SSPCOMPILE_KEEP": "0.75"}
# From the third command on; the first build measures masks of many scores, as it does for its reader.
ONE_SCORE = {"SSPCOMPILE_CRITERION": "fisher"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("console") for line in block.splitlines()]
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


def test_the_readme_shows_the_two_commands_first():
    assert [command.split()[1] for command in commands() if command.startswith("sspcompile")][:2] == ["build", "bench"]


def test_pictures_and_linked_files_exist():
    prose = re.sub(r"(`+).*?\1", "", README, flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        if not target.startswith("http"):
            assert (REPOSITORY / target).exists(), target


def test_the_readme_counts_scores_and_scenarios_as_there_are():
    shipped = [path for path in shipped_recipes() if path.parent != SCENARIOS_DIR]
    assert f"any of {len(CRITERIA)} head scores" in README
    assert len(shipped) == 9 and "one of nine scenarios" in README


def test_the_tables_of_scores_show_what_was_measured():
    table, dense = summarised(REPOSITORY / RESULTS / "summary.json")
    for path in DOCUMENTS:
        text = (REPOSITORY / path).read_text("utf-8")
        assert f"\n{table}\n" in text and f"(dense: {dense:.3f})" in text, path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("readme")
    config = family_config("llama", layers=3, hidden=96)
    # Words for tokens, as real models have them: with bytes the texts are five times as long.
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    config.vocab_size = len(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    save_random(place / "my-model", config)
    tokenizer.save_pretrained(place / "my-model")
    # Stands for the real model that `make demo-llm` brings.
    shutil.copytree(MODEL_DIR, place / "SmolLM2-135M-Instruct")
    (place / "prompts.txt").write_text("".join(f"What is {n} plus {2 * n}?\n" for n in range(24)))
    (place / "questions.jsonl").write_text('{"prompt": "What is 50 plus 2?", "answer": "52"}\n' * 3)
    return place


@pytest.mark.whole
def test_every_command_of_the_readme_runs(folder):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ran = 0
    for command in commands():
        if command.startswith(NOT_RUN):
            continue
        done = subprocess.run(
            command,
            shell=True,
            cwd=folder,
            env={**os.environ, **SHORT, **(ONE_SCORE if ran > 1 else {}), "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        ran += 1
    assert ran >= 5
    for snippet in blocks("python"):
        done = subprocess.run(
            [sys.executable, "-c", snippet],
            cwd=folder,
            env={**os.environ, **SHORT, **ONE_SCORE},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{snippet}\n{done.stderr}"
