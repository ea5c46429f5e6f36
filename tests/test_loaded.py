"""What `load` refuses, and what it never runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders import FAMILY_SETTINGS, Shape, family_config, make_checkpoint, save_random
from safetensors.torch import load_file, save_file

from sspcompile.errors import ArtifactError, CheckpointError
from sspcompile.model import decoder
from sspcompile.model.hooks import head_gates
from sspcompile.model.loading import load
from sspcompile.slicing import modeling_sspcompile
from sspcompile.slicing.configuration import ships_code


@pytest.fixture
def folder(tmp_path):
    return make_checkpoint(tmp_path / "model", Shape())


def refused(folder, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        load(folder, fingerprint="")
    assert "\n" not in str(caught.value)


def test_broken_tokenizer_is_refused_in_one_line(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model"')
    refused(folder, "tokenizer.json is not valid JSON")


def test_tokenizer_with_more_tokens_than_the_model_is_loaded(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 259}))
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:259].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load(folder, fingerprint="")
    assert len(loaded.tokenizer) == 260 and loaded.vocab == 259


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_with_the_tensor(folder, bad):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = bad
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, r"model\.layers\.1\.mlp\.up_proj\.weight")


def test_rotary_positions_that_nobody_knows_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "mystery", "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "cannot load")


def test_gates_of_another_shape_are_refused(folder):
    loaded = load(folder, fingerprint="")
    with pytest.raises(ValueError, match="gates"), head_gates(loaded, torch.ones(2, 3)):
        pass


def test_code_that_is_not_ours_is_never_run_from_an_artifact(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoModelForCausalLM": "modeling_sspcompile.X"}}))
    with pytest.raises(ArtifactError, match="not run"):
        ships_code(tmp_path)
    ours = Path(modeling_sspcompile.__file__).read_bytes()
    (tmp_path / "modeling_sspcompile.py").write_bytes(ours)
    assert ships_code(tmp_path)
    (tmp_path / "modeling_sspcompile.py").write_bytes(ours + b"\nimport os\n")
    with pytest.raises(ArtifactError, match="not run"):
        ships_code(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert not ships_code(tmp_path)


@pytest.mark.parametrize("family", FAMILY_SETTINGS)
def test_scored_logits_are_the_models_own(family, tmp_path):
    """Granite scales its logits and Gemma 2 bends them after lm_head; divergence is of what the model puts out."""
    model = save_random(tmp_path, family_config(family))
    loaded = load(model, fingerprint="")
    ids = torch.arange(24).reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    scored = torch.zeros_like(mask, dtype=torch.bool)
    scored[0, 4:], scored[1, 8] = True, True
    expected = loaded.model(input_ids=ids, attention_mask=mask).logits[scored]
    assert torch.allclose(loaded.scored_logits(ids, mask, scored), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logits_of_a_model_in_16_bits_are_not_rounded_once_more(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(decoder, "ROWS_AT_ONCE", 7)
    loaded = load(save_random(tmp_path, family_config("llama")), fingerprint="", dtype=getattr(torch, dtype))
    hidden = 30 * torch.randn(5, loaded.geometry.hidden, generator=torch.Generator().manual_seed(0)).to(
        loaded.model.dtype
    )
    exact = hidden.double() @ loaded.model.lm_head.weight.double().T
    found = loaded.logits_of(hidden)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), exact, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(loaded.model.lm_head(hidden).double(), exact, rtol=1e-5, atol=1e-5)


def test_a_gradient_of_16_bits_passes_through_the_logits(tmp_path):
    loaded = load(save_random(tmp_path, family_config("llama")), fingerprint="", dtype=torch.bfloat16)
    hidden = torch.ones(2, loaded.geometry.hidden, dtype=torch.bfloat16, requires_grad=True)
    (found,) = torch.autograd.grad(loaded.logits_of(hidden).sum(), hidden)
    assert found.dtype == torch.bfloat16 and found.abs().sum() > 0
