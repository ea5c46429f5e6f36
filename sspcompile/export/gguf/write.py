"""Writing the file: settings and tokenizer first, then every tensor, streamed. A band of one tensor is in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sspcompile.checkpoint.transfer import copy_extent, write_all
from sspcompile.export.gguf.rounding import Kind, nbytes, type_of
from sspcompile.export.gguf.source import Source
from sspcompile.export.gguf.vocabulary import DEFAULT_TEMPLATE, Vocabulary
from sspcompile.export.gguf.weights import Written, padded_counts, written_tensors
from sspcompile.progress import Progress, silent

if TYPE_CHECKING:
    from gguf import GGUFWriter

# Granite's multipliers -> how they are called in a GGUF.
MULTIPLIERS = {
    "embedding": "embedding_scale",
    "attention": "attention.scale",
    "residual": "residual_scale",
    "logits": "logit_scale",
}

SPECIAL_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
    "pad": "padding_token_id",
    "unk": "unknown_token_id",
}


def write_gguf(
    source: Source,
    vocabulary: Vocabulary,
    path: Path,
    kind: Kind,
    *,
    name: str,
    origin: Mapping[str, Any],
    progress: Progress = silent,
) -> None:
    """Write a model as one file. `origin`: what a manifest says of where it comes from; its licence goes inside.

    Raises CheckpointError for values that `kind` cannot hold and for files that end early.
    """
    from sspcompile.export.gguf.packing import Writer

    tensors = written_tensors(source, kind)
    writer = Writer(path, source.model.form.architecture)
    _describe(writer, kind, name, origin)
    _state(writer, source)
    _tell(writer, vocabulary)
    for tensor in tensors:
        _announce(writer, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    alignment = writer.data_alignment
    writer.close()
    _stream(path, tensors, alignment, progress)


def _announce(writer: GGUFWriter, tensor: Written) -> None:
    size = nbytes(tensor.kind, tensor.shape)
    # A shape in elements goes with any dtype but uint8, which would be taken for one in bytes.
    writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=type_of(tensor.kind))


def _stream(path: Path, tensors: Sequence[Written], alignment: int, progress: Progress) -> None:
    """Append the tensors, each at the next multiple of `alignment`."""
    sizes = [nbytes(tensor.kind, tensor.shape) for tensor in tensors]
    total, done = sum(sizes), 0

    def moved(count: int) -> None:
        nonlocal done
        done += count
        progress("weights", done, total)

    progress("weights", 0, total)
    with path.open("r+b", buffering=0) as stream:
        target, end = stream.fileno(), stream.seek(0, os.SEEK_END)
        if total and hasattr(os, "posix_fallocate"):  # a disk without room says so now, and writing is faster
            os.posix_fallocate(target, 0, end + -end % alignment + sum(size + -size % alignment for size in sizes))
        write_all(target, bytes(-end % alignment))
        opened: dict[Path, Any] = {}
        try:
            for tensor, size in zip(tensors, sizes, strict=True):
                if tensor.copied:
                    for part in tensor.parts:
                        file = part.info.file
                        if file not in opened:
                            opened[file] = file.open("rb", buffering=0)
                        copy_extent(opened[file].fileno(), target, part.info.extent, moved, kernel=False)
                else:
                    for band in tensor.bands():
                        write_all(target, np.ascontiguousarray(band).data.cast("B"))
                        moved(band.nbytes)
                write_all(target, bytes(-size % alignment))
        finally:
            for file in opened.values():
                file.close()


def _describe(writer: GGUFWriter, kind: Kind, name: str, origin: Mapping[str, Any]) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(kind.file_type)
    writer.add_quantization_version(2)
    licence = origin.get("licence", {})
    told = (
        (writer.add_license, "license"),
        (writer.add_license_name, "license_name"),
        (writer.add_license_link, "license_link"),
    )
    for add, key in told:
        if licence.get(key):
            add(licence[key])
    source = str(origin.get("source_name") or "")
    if source:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, Path(source).name)


def _state(writer: GGUFWriter, source: Source) -> None:
    """What the architecture asks for: sizes, positions, scales."""
    g, model, a = source.geometry, source.model, source.model.form.architecture
    heads: Any = [heads for heads, _ in model.counts]
    kv_heads: Any = [kv_heads for _, kv_heads in model.counts]
    widths: Any = list(model.widths)
    if model.form.padded and model.arrays:
        (heads, kv_heads), widths = padded_counts(model.counts), max(widths)
    elif not model.arrays:
        heads, kv_heads, widths = heads[0], kv_heads[0], widths[0]
    writer.add_vocab_size(g.vocab)
    writer.add_context_length(source.context)
    writer.add_embedding_length(g.hidden)
    writer.add_block_count(g.layers)
    writer.add_feed_forward_length(widths)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(source.epsilon)
    # Without these llama.cpp derives them from hidden_size and the number of heads.
    writer.add_key_length(g.head_dim)
    writer.add_value_length(g.head_dim)
    writer.add_rope_dimension_count(g.head_dim)
    _turn(writer, source)
    for key, value in model.multipliers.items():
        writer.add_float32(f"{a}.{MULTIPLIERS[key]}", value)


def _turn(writer: GGUFWriter, source: Source) -> None:
    from gguf import RopeScalingType

    g, model, a = source.geometry, source.model, source.model.form.architecture
    parameters, local = model.positions.parameters, model.positions.local
    writer.add_rope_freq_base(float(parameters["rope_theta"]))
    if parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(parameters["factor"]))
    if a == "step35":
        # It turns whole heads in sliding layers alone, so every layer slides, over the longest text.
        writer.add_uint32(f"{a}.rope.dimension_count_swa", g.head_dim)
        writer.add_sliding_window(source.context)
        writer.add_array(f"{a}.attention.sliding_window_pattern", [True] * g.layers)
        writer.add_float32(f"{a}.rope.freq_base_swa", float(parameters["rope_theta"]))
        writer.add_uint32(f"{a}.expert_feed_forward_length", 0)
    elif any(model.windows) and local is not None:
        writer.add_sliding_window(max(filter(None, model.windows)))
        writer.add_array(f"{a}.attention.sliding_window_pattern", [window is not None for window in model.windows])
        writer.add_float32(f"{a}.rope.freq_base_swa", float(local["rope_theta"]))


def _tell(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    writer.add_token_merges(list(vocabulary.merges))
    for name, number in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{SPECIAL_KEYS[name]}", number)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    for name, text in vocabulary.templates.items():
        writer.add_string("tokenizer.chat_template" + ("" if name == DEFAULT_TEMPLATE else f".{_plain(name)}"), text)
    if others := sorted(_plain(name) for name in vocabulary.templates if name != DEFAULT_TEMPLATE):
        writer.add_array("tokenizer.chat_templates", others)


def _plain(name: str) -> str:
    """A template's name as part of a key."""
    return "".join(character if character.isascii() and character.isalnum() else "_" for character in name)
