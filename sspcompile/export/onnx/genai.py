"""genai_config.json: what onnxruntime-genai must be told about the graph."""

from __future__ import annotations

from typing import Any

from sspcompile.checkpoint.settings import read_generation
from sspcompile.export.onnx.decoder import Decoder

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
    """The settings as plain data. Counts of key/value heads that differ by layer are read from the graph's inputs."""
    g, config = decoder.geometry, decoder.config
    generation = _generation(decoder)
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    first = eos[0] if isinstance(eos, list) and eos else eos
    pads = (generation.get("pad_token_id"), config.get("pad_token_id"), first, 0)
    pad = next(value for value in pads if value is not None)
    bos = generation.get("bos_token_id", config.get("bos_token_id"))
    return {
        "model": {
            "type": GENAI_TYPE.get(g.family.model_type, g.family.model_type),
            "bos_token_id": bos if bos is not None else pad,
            "eos_token_id": eos if eos is not None else pad,
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


def _generation(decoder: Decoder) -> dict[str, Any]:
    return read_generation(decoder.folder) or {}
