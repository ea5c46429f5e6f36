"""genai_config.json: what onnxruntime-genai must be told about the graph."""

from __future__ import annotations

from typing import Any

from sspcompile.checkpoint.settings import read_generation
from sspcompile.export.onnx.decoder import Decoder
from sspcompile.model.loading import load_tokenizer
from sspcompile.model.vocabulary import first_within

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
    ends = _ends(decoder, generation)
    pads = (generation.get("pad_token_id"), config.get("pad_token_id"), *ends, 0)
    pad = first_within(pads, g.vocab)
    bos = first_within((generation.get("bos_token_id"), config.get("bos_token_id"), pad), g.vocab)
    return {
        "model": {
            "type": GENAI_TYPE.get(g.family.model_type, g.family.model_type),
            "bos_token_id": bos,
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


def _ends(decoder: Decoder, generation: dict[str, Any]) -> list[int]:
    """The end tokens that the model can write; empty for a model that has none, which the runtime takes.

    It refuses ids outside the table. A stand-in would end texts where nobody meant them to.
    """
    declared = generation.get("eos_token_id", decoder.config.get("eos_token_id"))
    vocab = decoder.geometry.vocab
    found = [
        i for i in (declared if isinstance(declared, list) else [declared]) if first_within([i], vocab) is not None
    ]
    if found:
        return found
    own = first_within([load_tokenizer(decoder.folder).eos_token_id], vocab)
    return [] if own is None else [own]


def _generation(decoder: Decoder) -> dict[str, Any]:
    return read_generation(decoder.folder) or {}
