"""A model that sees is refused with a command that saves its text part; what that writes is the same model of texts."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from builders import VOCAB, byte_tokenizer
from test_slicing_exact import mask_for
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from sspcompile.checkpoint import Checkpoint
from sspcompile.slicing.mask import dump_mask

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
# Qwen2 has no head_dim of its own.
QWEN2 = {name: value for name, value in SIZES.items() if name != "head_dim"} | {"num_attention_heads": 4}
EYES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CLIP = {"model_type": "clip_vision_model", **EYES, "image_size": 28, "patch_size": 14, "projection_dim": 32}
SIGLIP = {"model_type": "siglip_vision_model", **EYES, "image_size": 28, "patch_size": 14}
PIXTRAL = {"model_type": "pixtral", **EYES, "image_size": 28, "patch_size": 14, "head_dim": 16}
QWEN_EYES = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
QWEN_TOKENS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
IDEFICS = {**EYES, "image_size": 28, "patch_size": 14}


def text(family: str, **more: object) -> dict:
    return {"model_type": family, **SIZES, **more}


def rope(*sections: int) -> dict:
    return {"rope_type": "default", "rope_theta": 5e4, "mrope_section": list(sections)}


# Name -> (type, family of the text part, settings).
SEEING: dict[str, tuple[str, str, dict]] = {
    "LLaVA on Llama": ("llava", "llama", {"vision_config": CLIP, "text_config": text("llama")}),
    "LLaVA on Mistral": (
        "llava",
        "mistral",
        {"vision_config": CLIP, "text_config": text("mistral", sliding_window=None)},
    ),
    "LLaVA-NeXT": ("llava_next", "llama", {"vision_config": CLIP, "text_config": text("llama")}),
    "Gemma 3": (
        "gemma3",
        "gemma3_text",
        {
            "vision_config": SIGLIP,
            "text_config": text("gemma3_text", query_pre_attn_scalar=16, sliding_window=8),
            "mm_tokens_per_image": 4,
        },
    ),
    "Qwen2.5-VL": (
        "qwen2_5_vl",
        "qwen2",
        {
            "text_config": {**QWEN2, "rope_parameters": rope(2, 3, 3)},
            "vision_config": {**QWEN_EYES, "patch_size": 14, "window_size": 28, "fullatt_block_indexes": [0]},
            **QWEN_TOKENS,
        },
    ),
    "Qwen3-VL": (
        "qwen3_vl",
        "qwen3",
        {
            "text_config": {**SIZES, "rope_parameters": rope(4, 2, 2)},
            "vision_config": {**QWEN_EYES, "patch_size": 14, "deepstack_visual_indexes": [0]},
            **QWEN_TOKENS,
        },
    ),
    "SmolVLM": (
        "smolvlm",
        "llama",
        {"text_config": text("llama"), "vision_config": IDEFICS, "scale_factor": 1, "image_token_id": 5},
    ),
    "Idefics 3": (
        "idefics3",
        "llama",
        {"text_config": text("llama"), "vision_config": IDEFICS, "scale_factor": 1, "image_token_id": 5},
    ),
    "Mistral 3": (
        "mistral3",
        "mistral",
        {"text_config": text("mistral", sliding_window=None), "vision_config": PIXTRAL, "spatial_merge_size": 1},
    ),
}


def seeing(folder: Path, name: str, **more: object) -> Path:
    kind, _, settings = SEEING[name]
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **settings, **more))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def saved_as_it_says(folder: Path, run, tmp_path: Path, monkeypatch) -> Path:
    """What the hint's command writes; it is run as a shell would read it."""
    code, out, err = run("plan", "--model", folder, "--keep", 0.5)
    assert (code, out, err.count("\n")) == (2, "", 1) and str(folder) in err, err
    python, option, command = shlex.split(err[err.index("python -c") :])
    assert (python, option) == ("python", "-c")
    monkeypatch.chdir(tmp_path)
    exec(command, {})
    return tmp_path / "text"


@pytest.mark.parametrize("name", SEEING)
def test_text_part_saved_as_the_hint_says_is_the_same_model_and_can_be_cut(name, run, tmp_path, monkeypatch):
    folder = seeing(tmp_path / "seeing", name)
    saved = saved_as_it_says(folder, run, tmp_path, monkeypatch)
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        whole = AutoModelForImageTextToText.from_pretrained(folder).eval()(input_ids=ids).logits
        alone = AutoModelForCausalLM.from_pretrained(saved).eval()(input_ids=ids).logits
    assert torch.equal(whole, alone)
    assert Checkpoint(saved).geometry.family.model_type == SEEING[name][1]
    assert run("plan", "--model", saved, "--keep", 0.5)[0] == 0
    (tmp_path / "mask.json").write_text(dump_mask(mask_for(Checkpoint(saved), 0.5, "per-layer", 3)))
    cut = ("--mask", tmp_path / "mask.json", "--any-model", "--out", tmp_path / "cut")
    assert run("slice", "--model", saved, *cut)[0] == 0
    assert run("verify", tmp_path / "cut", "--layerwise")[0] == 0


@pytest.mark.parametrize("tied", [False, True])
def test_head_is_tied_where_it_is_one_matrix(tied, run, tmp_path, monkeypatch):
    """Said once for the whole and once for the text part, which may differ."""
    folder = seeing(tmp_path / "seeing", "Qwen2.5-VL", tie_word_embeddings=tied)
    saved = saved_as_it_says(folder, run, tmp_path, monkeypatch)
    assert Checkpoint(saved).geometry.tied is tied
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        whole = AutoModelForImageTextToText.from_pretrained(folder).eval()(input_ids=ids).logits
        alone = AutoModelForCausalLM.from_pretrained(saved).eval()(input_ids=ids).logits
    assert torch.equal(whole, alone)


def test_settings_at_the_top_are_seen_too(run, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "vision_config": {}, **SIZES}))
    code, _, err = run("plan", "--model", tmp_path, "--keep", 0.5)
    assert code == 2 and "its text part, a qwen2 model" in err and "model_type='qwen2'" in err


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mllama", "vision_config": {}, "text_config": {"model_type": "mllama_text_model"}},
        {"model_type": "voxtral", "audio_config": {}, "text_config": {"model_type": "llama"}},
        {"model_type": "llava", "vision_config": {}, "text_config": {"model_type": ["llama"]}},
        {"model_type": "llava", "vision_config": {}, "text_config": "llama"},
    ],
)
def test_others_are_refused_without_a_command_that_was_not_tried(config, run, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, _, err = run("plan", "--model", tmp_path, "--keep", 0.5)
    assert code == 2 and f"Models of type '{config['model_type']}' cannot be cut" in err and "python -c" not in err
