"""A model folder: configuration, and the places of its tensors under the names of the family table.

Opening one reads the configuration and headers; values are read by slices, as raw words.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sspcompile.checkpoint.companions import left_out
from sspcompile.checkpoint.foreign import (
    files_in,
    is_adapter,
    no_head,
    no_weights,
    other_weights,
    refuse_adapted,
    refuse_other_architecture,
    refuse_other_task,
)
from sspcompile.checkpoint.headers import FLOATS, TensorInfo, read_header, read_words
from sspcompile.checkpoint.names import canonical, key_mapping, stored_prefix
from sspcompile.checkpoint.quantised import KEYS as QUANTISATION_KEYS
from sspcompile.checkpoint.quantised import declared, quantised_error, refuse_declared, refuse_quantised
from sspcompile.checkpoint.settings import read_generation, read_json
from sspcompile.checkpoint.tensors import LM_HEAD, tensor_shapes
from sspcompile.checkpoint.tied import untied_by_weights
from sspcompile.checkpoint.tokenizers import named_class_counts
from sspcompile.checkpoint.towers import refuse_seeing
from sspcompile.errors import CheckpointError, UnsupportedModelError
from sspcompile.families import Geometry, geometry_of

DTYPE_OF_CONFIG = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CAUSAL = "ForCausalLM"


class Checkpoint:
    """One model folder: configuration and tensor table. Opening it reads headers only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / "config.json")
        refuse_seeing(self.config, path)
        self._stated = geometry_of(self.config)
        read_generation(path)

    @cached_property
    def geometry(self) -> Geometry:
        """Sizes, from the configuration; where the weights untie the head, they have the last word."""
        stated = self._stated
        if stated.family.hosts and not stated.family.tokenizer:
            stated = replace(stated, named_tokenizer=named_class_counts(self.path, self.config))
        return untied_by_weights(stated, self._table) if stated.tied and self.has_weights else stated

    @property
    def carried_config(self) -> dict[str, Any]:
        """The configuration that goes with the tensors under their names in the family table.

        A null where a quantisation would be described says nothing in transformers 5 and ends 4.57 with an error. The
        class of the decoder alone is not the one that these tensors are of.
        """
        config = {key: value for key, value in self.config.items() if value is not None or key not in QUANTISATION_KEYS}
        named = config.get("architectures")
        if isinstance(named, list) and named and not any(str(name).endswith(CAUSAL) for name in named):
            config["architectures"] = [self._stated.family.architecture]
        return config

    @cached_property
    def stored(self) -> Mapping[str, TensorInfo]:
        """Name -> place of what lies on disk, as it is called there, in file order. Raises as `plain_table` does."""
        return plain_table(self.path, self.config)

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name in the family table -> place, in file order.

        Raises CheckpointError when files contradict index or configuration, and UnsupportedModelError for what is not
        a language model in plain weights.
        """
        _check_against(self._table, self.geometry, self.path)
        return self._table

    @cached_property
    def _table(self) -> Mapping[str, TensorInfo]:
        return _named(self.stored, self.config, self._stated, self.path)

    @property
    def has_weights(self) -> bool:
        """Whether the folder holds weights, readable or not; `tensors` says what is wrong with them."""
        names = files_in(self.path)
        return INDEX_NAME in names or is_adapter(names) or other_weights(names) is not None

    def expected(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name -> (shape, dtype) of every tensor: from the headers, or from the configuration without weights."""
        if self.has_weights:
            return {name: (info.shape, info.dtype) for name, info in self.tensors.items()}
        refuse_declared(self.config, self.path)
        refuse_other_architecture(self.config, self.path)
        dtype = DTYPE_OF_CONFIG.get(self.geometry.dtype, "F32")
        return {name: (shape, dtype) for name, shape in tensor_shapes(self.geometry).items()}

    def read(self, name: str) -> np.ndarray:
        """The whole tensor as raw words, in its shape."""
        return read_words(self.tensors[name])

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start..stop of the first axis as raw words, [stop - start, ...]."""
        return read_words(self.tensors[name].band(start, stop))

    def chunks(self, name: str, chunk_bytes: int = 1 << 24) -> Iterator[bytes]:
        """The tensor's bytes in pieces of at most `chunk_bytes`."""
        info = self.tensors[name]
        with info.file.open("rb") as stream:
            stream.seek(info.offset)
            left = info.nbytes
            while left:
                piece = stream.read(min(chunk_bytes, left))
                if not piece:
                    raise CheckpointError(f"{info.file.name} ends inside {name}.", hint="Download it again.")
                left -= len(piece)
                yield piece


def _weight_files(folder: Path) -> dict[str, set[str] | None]:
    """File name -> the tensor names that the index promises in it (None without an index)."""
    # With both, transformers reads the single file; so do we, or the model cut would not be the model measured.
    if (folder / SINGLE_NAME).is_file():
        return {SINGLE_NAME: None}
    if (folder / INDEX_NAME).is_file():
        return _promised(folder / INDEX_NAME)
    raise no_weights(folder)


def _promised(index: Path) -> dict[str, set[str] | None]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map.", hint="Download it again.")
    promised: dict[str, set[str] | None] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(
                f"{index.name} points to {file!r}.", hint="Shards must lie in the model folder itself."
            )
        names = promised.setdefault(file, set())
        if names is not None:
            names.add(tensor)
    return promised


def tensor_table(folder: Path) -> dict[str, TensorInfo]:
    """Name -> place of every tensor of a folder, whatever model it holds. Raises CheckpointError."""
    table: dict[str, TensorInfo] = {}
    for file, promised in sorted(_weight_files(folder).items()):
        path = folder / file
        if not path.is_file():
            raise CheckpointError(f"{folder} lacks the shard {file}.", hint="Download the missing shard.")
        found = read_header(path)
        if promised is not None and (absent := promised - set(found)):
            raise CheckpointError(f"{file} lacks {min(absent)}, which the index promises.", hint="Download it again.")
        if double := set(found) & set(table):
            raise CheckpointError(f"{min(double)} stands in two shards.", hint="Download the checkpoint again.")
        table |= found
    return table


def plain_table(folder: Path, config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """`tensor_table` of a language model in plain weights; UnsupportedModelError, with the way to one, for others."""
    _refuse_named(folder, config)
    try:
        table = tensor_table(folder)
    except UnsupportedModelError as error:  # a dtype that only quantised weights have
        said = declared(config)
        if said is None:
            raise
        raise quantised_error(said, error.message.rstrip("."), folder) from error
    refuse_adapted(folder, table)
    refuse_quantised(config, table, folder)
    refuse_other_task(config, table, stored_prefix(table), folder)
    return table


def _refuse_named(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError when the configuration names weights that transformers would read instead."""
    read = SINGLE_NAME if (folder / SINGLE_NAME).is_file() else INDEX_NAME
    named = config.get("transformers_weights")
    if named not in (None, read):
        raise UnsupportedModelError(
            f"config.json names its weights in transformers_weights: {named!r:.60}.",
            hint=f"Call them {SINGLE_NAME}, or {INDEX_NAME} with its shards, and remove the key.",
        )


def named_tensors(folder: Path, config: Mapping[str, Any], geometry: Geometry) -> dict[str, TensorInfo]:
    """Name in the family table -> place, in file order; shapes are the caller's to check.

    Raises what `plain_table` raises, and CheckpointError for files that contradict each other.
    """
    return _named(plain_table(folder, config), config, geometry, folder)


def _named(
    table: Mapping[str, TensorInfo], config: Mapping[str, Any], geometry: Geometry, folder: Path
) -> dict[str, TensorInfo]:
    found = canonical(table, geometry)
    if not geometry.tied and LM_HEAD not in found:
        raise no_head(config, folder)
    return found


def loading_keys(folder: Path) -> dict[str, str]:
    """`key_mapping` for transformers' `from_pretrained`; empty where it finds the tensors by itself."""
    return key_mapping(tensor_table(folder))


def _check_against(table: Mapping[str, TensorInfo], geometry: Geometry, folder: Path) -> None:
    wanted = tensor_shapes(geometry)
    for name, shape in wanted.items():
        if name not in table:
            raise CheckpointError(
                f"{folder} lacks the tensor {name}, which its config.json demands.",
                hint="config.json and weights must be of the same model; if they are, download them again.",
            )
        if table[name].dtype not in FLOATS:
            raise UnsupportedModelError(
                f"{folder} stores {name} as {table[name].dtype}.", hint=f"Accepted: {', '.join(FLOATS)}."
            )
        if table[name].shape == (0,):
            raise CheckpointError(
                f"{folder} holds an empty {name}: it was saved while DeepSpeed (ZeRO-3) held the weights elsewhere.",
                hint="Gather them with DeepSpeed's zero_to_fp32.py, and save again.",
            )
        if table[name].shape != shape:
            raise CheckpointError(
                f"{name} has shape {list(table[name].shape)}; config.json asks for {list(shape)}.",
                hint="config.json and weights must be of the same model.",
            )
    # Tied checkpoints sometimes carry a redundant lm_head; it passes through unchanged.
    spare = {name for name in table if name not in wanted and name != LM_HEAD}
    spare = {name for name in spare if not name.endswith("rotary_emb.inv_freq")}
    if spare:
        raise UnsupportedModelError(
            f"{folder} holds {min(spare)}, which {geometry.family.architecture} does not have.",
            hint="config.json and weights must be of the same model, without parts that were added to it.",
        )


def demand_shapes(folder: Path, tensors: Mapping[str, TensorInfo], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError for a tensor that is not there in the shape that an export of the folder takes."""
    for name, shape in wanted.items():
        if name not in tensors or tensors[name].shape != shape:
            found = list(tensors[name].shape) if name in tensors else "nothing"
            raise CheckpointError(
                f"{folder} holds {found} as {name}; its config.json asks for {list(shape)}.",
                hint="Build or download it again.",
            )


def file_order(folder: Path) -> list[Path]:
    """The weight files that are read of a folder, sorted by name. Raises CheckpointError."""
    return [folder / name for name in sorted(_weight_files(folder))]


def refuse_by_configuration(folder: Path) -> None:
    """Raise for a folder whose config.json alone shows that it cannot be cut, or is broken."""
    refuse_declared(Checkpoint(folder).config, folder)


def absent_shards(folder: Path) -> list[str]:
    """Shards that the index of a folder promises and the folder lacks."""
    if (folder / SINGLE_NAME).is_file() or not (folder / INDEX_NAME).is_file():
        return []
    return sorted(name for name in _promised(folder / INDEX_NAME) if not (folder / name).is_file())


def not_carried(folder: Path) -> list[str]:
    """What lies in a model folder and goes with no cut of it (see `companions`), weights that are not read included."""
    return left_out(folder, [INDEX_NAME, *(path.name for path in file_order(folder))])


def sync_folder(folder: Path) -> None:
    """Flush a directory entry to disk, so that a rename survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
