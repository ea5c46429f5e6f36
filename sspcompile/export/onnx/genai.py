"""genai_config.json: what onnxruntime-genai must be told about the graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sspcompile.checkpoint.settings import read_generation
from sspcompile.export.onnx.decoder import Decoder
from sspcompile.model.vocabulary import declared_ends, first_within

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
    """The settings as plain data. Counts of key/value heads that differ by layer are read from the graph's inputs. A
    layer without attention is none of its layers: it asks for the keys and values of every layer that it knows of.

    Special tokens are those that transformers' `generate` takes.
    """
    g, said = decoder.geometry, _generation(decoder)
    ends = _ends(decoder, said)
    pad = first_within((said.get("pad_token_id"), *ends, 0), g.vocab)
    return {
        "model": {
            "type": GENAI_TYPE.get(g.family.model_type, g.family.model_type),
            "bos_token_id": first_within((said.get("bos_token_id"), pad), g.vocab),
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
                "num_hidden_layers": len(decoder.caches),
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


def _ends(decoder: Decoder, said: Mapping[str, Any]) -> list[int]:
    """The end tokens that the model can write; empty for a model that has none, which the runtime takes.

    It refuses ids outside the table. A stand-in would end texts where nobody meant them to.
    """
    vocab = decoder.geometry.vocab
    found = declared_ends(said.get("eos_token_id"), vocab)
    if found:
        return found
    from sspcompile.model.loading import load_tokenizer

    return declared_ends(load_tokenizer(decoder.folder).eos_token_id, vocab)


def _generation(decoder: Decoder) -> Mapping[str, Any]:
    """Where `generate` looks: generation_config.json, whatever it leaves open, and config.json only in its absence."""
    found = read_generation(decoder.folder)
    return decoder.config if found is None else found
