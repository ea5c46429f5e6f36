"""ONNX exports in optimum's ORTModelForCausalLM, in an environment without sspcompile. Fixtures: write.py."""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path

import pytest

pytestmark = pytest.mark.optimum

FIXTURES = Path(os.environ.get("OPTIMUM_FIXTURES", "/nonexistent"))
CASES = sorted(path.parent for path in FIXTURES.glob("*/case.json"))
if not CASES:
    pytest.skip("run through `make test-optimum`, which writes the fixtures first", allow_module_level=True)

import torch  # noqa: E402
import transformers  # noqa: E402
from optimum.onnxruntime import ORTModelForCausalLM  # noqa: E402


def test_this_is_an_environment_of_its_own():
    assert transformers.__version__.startswith("4.57")
    with pytest.raises(ModuleNotFoundError):
        __import__("sspcompile")


def generated(model, case: Path) -> list[list[int]]:
    facts = json.loads((case / "case.json").read_text())
    ids, mask = torch.tensor(facts["ids"]), torch.tensor(facts["mask"])
    count = max(map(len, facts["tails"]))
    output = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=facts["pad"])
    return [row[: len(tail)] for row, tail in zip(output[:, ids.shape[1] :].tolist(), facts["tails"], strict=True)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_optimum_writes_what_transformers_writes_in_a_padded_batch(case):
    load = runpy.run_path(str(case / "onnx" / "optimum_model.py"))["load"]
    assert generated(load(case / "onnx"), case) == json.loads((case / "case.json").read_text())["tails"]


@pytest.mark.parametrize("case", CASES[:1], ids=lambda case: case.name)
def test_the_helper_is_needed(case):
    """Once optimum sizes the cache by itself, the helper can go."""
    with pytest.raises(Exception, match=r"(?i)invalid|dimension|shape"):
        generated(ORTModelForCausalLM.from_pretrained(case / "onnx", use_io_binding=False), case)
