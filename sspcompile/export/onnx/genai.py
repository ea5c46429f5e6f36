"""genai_config.json: what onnxruntime-genai must be told about the graph."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sspcompile.export.onnx.decoder import Decoder
from sspcompile.model.loading import demand_json

# Names that onnxruntime-genai gives to families; it treats all of them as the same kind of decoder.
GENAI_TYPE = {"seed_oss": "llama"}
SEARCH: dict[str, Any] = {
    "do_sample": False,
    "early_stopping": True,
    "num_beams": 1,
    "num_return_sequences": 1,
    "past_present_share_buffer": True,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "length_penalty": 1.0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "diversity_penalty": 0.0,
}


def genai_config(decoder: Decoder) -> dict[str, Any]:
    """The settings as plain data. Counts of key/value heads that differ by layer are read from the graph's inputs.

    Special tokens are those that transformers' `generate` takes. onnxruntime-genai refuses ids beyond the vocabulary,
    which cannot be written either, and takes a missing end for token 0: a model without one has an empty list.
    """
    g, said = decoder.geometry, _generation(decoder)
    declared = said.get("eos_token_id")
    ends = [token for token in (declared if isinstance(declared, list) else [declared]) if _is_token(token, g.vocab)]
    pad = next(token for token in (said.get("pad_token_id"), *ends, 0) if _is_token(token, g.vocab))
    bos = said.get("bos_token_id")
    return {
        "model": {
            "type": GENAI_TYPE.get(g.family.model_type, g.family.model_type),
            "bos_token_id": bos if _is_token(bos, g.vocab) else pad,
            "eos_token_id": ends[0] if len(ends) == 1 else ends,
            "pad_token_id": pad,
            "context_length": decoder.positions,
            "vocab_size": g.vocab,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": g.head_dim,
                "hidden_size": g.hidden,
                "num_attention_heads": max(layer.heads for layer in decoder.layers),
                "num_key_value_heads": max(layer.kv_heads for layer in decoder.layers),
                "num_hidden_layers": g.layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"max_length": decoder.positions, **SEARCH},
    }


def _is_token(token: object, vocab: int) -> bool:
    return type(token) is int and 0 <= token < vocab


def _generation(decoder: Decoder) -> Mapping[str, Any]:
    """Where `generate` looks: generation_config.json, whatever it leaves open, and config.json only in its absence."""
    path = decoder.folder / "generation_config.json"
    if not path.is_file():
        return decoder.config
    demand_json(path)
    return json.loads(path.read_text("utf-8"))
