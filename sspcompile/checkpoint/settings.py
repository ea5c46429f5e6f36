"""The JSON files of a model folder: objects whose values have the types that their readers rely on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sspcompile.errors import CheckpointError

GENERATION = "generation_config.json"
ONE_TOKEN = ("bos_token_id", "pad_token_id")
END_TOKENS = "eos_token_id"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError for a file that is missing or holds something else."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} has no {path.name}.", hint="--model takes a Hugging Face model folder."
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.", hint="Download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object.", hint="Download it again.")
    return value


def read_generation(folder: Path) -> dict[str, Any] | None:
    """generation_config.json of a model folder, None where there is none.

    transformers takes a file that it cannot parse for no file at all, and an end token that is text for one that never
    comes: the model then stops at other tokens than its makers wanted, or never. Raises CheckpointError for both.
    """
    path = folder / GENERATION
    if not path.is_file():
        return None
    found = read_json(path)
    _demand_token_ids(found, path)
    return found


def _demand_token_ids(values: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError where the special tokens of a file have another type than ids have."""
    for key in (*ONE_TOKEN, END_TOKENS):
        value = values.get(key)
        several = key == END_TOKENS and isinstance(value, list)
        tokens: list[Any] = list(value or []) if several else [] if value is None else [value]
        if not all(type(token) is int for token in tokens):
            accepted = "a token id, a list of them" if key == END_TOKENS else "a token id"
            raise CheckpointError(f"{path} has {value!r} as {key}.", hint=f"Accepted: {accepted} or null.")
