"""Which class reads a tokenizer: the files beside a model decide together with its model_type.

transformers 5 has types whose tokenizer.json is read as it stands, types with a class of their own, and types (Llama,
Seed-OSS) for which the class that tokenizer_config.json names builds its own pipeline around the vocabulary, whatever
tokenizer.json says. A model that moves to another family's class must not change its tokens on the way. Source:
`AutoTokenizer.from_pretrained` in tokenization_auto.py of transformers 5.23.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sspcompile.checkpoint.references import TOKENIZER_CONFIG, read_settings

# Names that stand for "as tokenizer.json says".
FROM_FILE = ("PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend", "PythonBackend")
LLAMA = "LlamaTokenizer"


def named_class_counts(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether the class that the folder names would build a pipeline of its own, for a type where names count."""
    named = read_settings(folder / TOKENIZER_CONFIG).get("tokenizer_class") or config.get("tokenizer_class")
    if named is None or named in FROM_FILE:
        return False
    file = folder / "tokenizer.json"
    if str(named).removesuffix("Fast") == LLAMA and file.is_file():
        return b'"ByteLevel"' not in file.read_bytes()
    return True


def name_class(folder: Path, name: str) -> None:
    """Let the written tokenizer be read by the class `name`, where its new type would follow another name."""
    path = folder / TOKENIZER_CONFIG
    settings = read_settings(folder / TOKENIZER_CONFIG)
    if settings and settings.get("tokenizer_class") != name:
        path.write_text(json.dumps({**settings, "tokenizer_class": name}, indent=2, ensure_ascii=False) + "\n", "utf-8")
