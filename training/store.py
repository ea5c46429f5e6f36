"""Writes the model folder so that transformers 4.57 and 5.x read the same model."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM
from transformers.utils import logging

from training.network import ROPE_THETA
from training.tokenizer import save_tokenizer


def save_model(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Weights in fp32, configuration, generation settings and tokenizer; `folder` is created if it is absent."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config.do_sample = False
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    # safetensors writes files that only their owner may read.
    (folder / "model.safetensors").chmod(0o644)
    save_tokenizer(tokenizer, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    # 4.57 reads rope_theta and torch_dtype, 5.x rope_parameters and dtype; without both one of them falls back.
    config["rope_theta"] = ROPE_THETA
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": ROPE_THETA}
    config["dtype"] = config["torch_dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
