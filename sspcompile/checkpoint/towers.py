"""Models that see: their text part can be cut, saved by itself. This says how."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sspcompile.errors import UnsupportedModelError
from sspcompile.families import FAMILIES

# Text parts under a type of their own, which for text alone are a family of the table: all three positions of a token
# are the same there.
OWN_TYPES = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
# Types whose older configurations have the text part's settings at the top.
FLAT = {"qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2"}
# Loaded by transformers, whatever the names on disk. The head is told to be tied where it is the same matrix.
SAVE = (
    "import transformers as t; m = t.AutoModelForImageTextToText.from_pretrained({source!r}, dtype='auto'); "
    "i, o = m.get_input_embeddings(), m.get_output_embeddings(); "
    "c = m.config.get_text_config(decoder=True).to_dict() "
    "| dict(model_type={kind!r}, tie_word_embeddings=i.weight is o.weight); "
    "n = t.AutoModelForCausalLM.from_config(t.AutoConfig.for_model(**c), dtype=m.dtype); "
    "n.model.load_state_dict(m.get_decoder().state_dict()); n.set_output_embeddings(o); "
    "n.save_pretrained('text'); t.AutoTokenizer.from_pretrained({source!r}).save_pretrained('text')"
)


def refuse_seeing(config: Mapping[str, Any], folder: Path) -> None:
    """Raise UnsupportedModelError for a model with a vision tower whose text part is of a family of the table."""
    kind = _text_family(config)
    if kind is None or config.get("vision_config") is None:
        return
    named = config.get("architectures")
    shown = named[0] if isinstance(named, list) and named else config.get("model_type")
    command = SAVE.format(source=str(folder), kind=kind)
    raise UnsupportedModelError(
        f"{folder} is a {shown}: it sees images beside its text part, a {kind} model, which can be cut alone.",
        hint=f'Save that in a folder of its own, and give it: python -c "{command}"',
    )


def _text_family(config: Mapping[str, Any]) -> str | None:
    model_type, text = config.get("model_type"), config.get("text_config")
    if not isinstance(model_type, str) or model_type in FAMILIES:
        return None
    if not isinstance(text, Mapping):
        return FLAT.get(model_type)
    kind = text.get("model_type")
    kind = OWN_TYPES.get(kind, kind) if isinstance(kind, str) else FLAT.get(model_type)
    return kind if kind in FAMILIES else None
