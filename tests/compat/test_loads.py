"""Cut models in an environment that has another transformers and no sspcompile. Fixtures: tests/compat/write.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.compat

FIXTURES = Path(os.environ.get("COMPAT_FIXTURES", "/nonexistent"))
# The constraints that this environment was made from.
CONSTRAINTS = os.environ.get("COMPAT_CONSTRAINTS", "constraints-compat.txt")
CASES = sorted(path.parent for path in FIXTURES.glob("*/case.json"))
if not CASES:
    pytest.skip("run through `make test-compat`, which writes the fixtures first", allow_module_level=True)

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def load(case: Path):
    facts = json.loads((case / "case.json").read_text())
    return AutoModelForCausalLM.from_pretrained(
        case / "cut",
        dtype=torch.float32,
        attn_implementation=facts["attention"],
        trust_remote_code=facts["custom_code"],
    ).eval()


def greedy(model, ids: list[int], count: int, **options) -> list[int]:
    prompt = torch.tensor([ids])
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        **options,
    )
    return output[0, len(ids) :].tolist()


def test_this_is_the_other_version():
    pins = (Path(__file__).parents[2] / CONSTRAINTS).read_text().splitlines()
    assert f"transformers=={transformers.__version__}" in pins
    with pytest.raises(ModuleNotFoundError):
        __import__("sspcompile")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cut_model_computes_what_the_masked_model_did(case):
    expected = np.load(case / "expected.npz")
    model, ids = load(case), expected["ids"].tolist()
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(logits - expected["logits"]).max() <= 1e-5 * np.abs(expected["logits"]).max()
    count = len(expected["tokens"])
    assert greedy(model, ids, count) == expected["tokens"].tolist()
    assert greedy(model, ids, count, cache_implementation="static") == expected["tokens"].tolist()
    assert AutoTokenizer.from_pretrained(case / "cut")("ab").input_ids


def test_every_model_loads_and_runs_without_a_word():
    # Of the positions of that one, dense or cut, transformers 5 says that it would rather have them spelled otherwise.
    cases = [str(case) for case in CASES if case.name != "phi3-per-layer-scaled"]
    script = [sys.executable, "-P", str(Path(__file__).with_name("silent.py")), *cases]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_per_layer_model_is_refused_without_its_code_and_survives_saving(case, tmp_path):
    if not json.loads((case / "case.json").read_text())["custom_code"]:
        assert "auto_map" not in json.loads((case / "cut" / "config.json").read_text())
        return
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(case / "cut", trust_remote_code=False)
    model = load(case)
    ids = torch.tensor([np.load(case / "expected.npz")["ids"].tolist()])
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", trust_remote_code=True, attn_implementation=model.config._attn_implementation
    )
    saved, read = model.state_dict(), again.state_dict()
    assert saved.keys() == read.keys()
    assert all(tensor.equal(read[name]) for name, tensor in saved.items())
    with torch.inference_mode():
        expected = model(ids).logits
        # Not bit for bit: weights that are mapped from files lie at another alignment, which rounds sums otherwise.
        assert (again(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        again.set_attn_implementation("eager")
        assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-4)
