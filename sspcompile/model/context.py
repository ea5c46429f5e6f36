"""How long a text may be for a model: read from its files, without opening it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sspcompile.checkpoint.settings import read_json
from sspcompile.model.llama_session import gguf_context, is_gguf
from sspcompile.model.onnx_session import GRAPH, read_settings


def positions_of(config: Mapping[str, Any]) -> int | None:
    """The longest text that a configuration is made for, in tokens; None where it does not say.

    That is `max_position_embeddings`, except where it names only what the model was trained on: dynamic scaling starts
    there, and YaRN at its `original_max_position_embeddings`, and both go `factor` times as far (Peng et al., YaRN,
    2023, section 3).
    """
    longest = config.get("max_position_embeddings")
    if type(longest) is not int or longest < 1:
        return None
    # The older spelling wins, as in transformers 5.
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(rope, Mapping) or not isinstance(rope.get("factor"), int | float):
        return longest
    trained = {"dynamic": longest, "yarn": rope.get("original_max_position_embeddings")}
    start = trained.get(rope.get("rope_type", rope.get("type")))
    return max(longest, int(rope["factor"] * start)) if isinstance(start, int) else longest


def context_of(folder: Path) -> int | None:
    """The longest text for a model folder or an export, in tokens; None where its files do not say.

    Raises CheckpointError or ArtifactError for damaged files.
    """
    if (folder / GRAPH).is_file():
        settings = read_settings(folder)
        return None if settings is None else settings.context_length
    said = gguf_context(folder) if is_gguf(folder) else None
    return said if said is not None else positions_of(read_json(folder / "config.json"))


def shortest_context(folders: Iterable[Path]) -> int | None:
    """The longest text that all of these models can read, in tokens; None where none of them says."""
    return min((found for found in map(context_of, folders) if found is not None), default=None)
