"""How long a text may be for a model: read from its files, without opening it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sspcompile.checkpoint.settings import read_json
from sspcompile.families import positions_of
from sspcompile.model.llama_session import gguf_context, is_gguf
from sspcompile.model.onnx_session import GRAPH, read_settings


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
