"""The export: weights placed, graph emitted, folder described, run against transformers, published."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx

import sspcompile
from sspcompile.checkpoint import Manifest, copy_companions, staged, write_manifest
from sspcompile.checkpoint.headers import TensorInfo
from sspcompile.checkpoint.references import drop_references, without_code
from sspcompile.checkpoint.replacing import refuse_existing
from sspcompile.checkpoint.tensors import EMBEDDING
from sspcompile.export.agreement import Agreement, Gate
from sspcompile.export.onnx.decoder import Decoder, read_decoder
from sspcompile.export.onnx.genai import genai_config
from sspcompile.export.onnx.graph import emit
from sspcompile.export.onnx.placed import Placed, Quantised
from sspcompile.export.onnx.structure import prove_structure
from sspcompile.export.onnx.weights import (
    DATA_FILE,
    DataFile,
    convert,
    data_bytes,
    quantise,
    share_weights,
    used_tensors,
    write_rotary,
)
from sspcompile.export.refitted import REFITTED
from sspcompile.families import positions_of
from sspcompile.model.blocks import BLOCK
from sspcompile.model.onnx_session import GRAPH, SETTINGS, demand_runtime
from sspcompile.model.placement import ON_CPU, Placement
from sspcompile.progress import Progress, silent

CHECKS = "check.json"
# How optimum, which lives in another environment, opens the folder.
OPTIMUM = "optimum_model.py"
# Matrices of one input, in the order in which they lie below each other.
JOINED: Mapping[str, str] = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


@dataclass(frozen=True)
class Precision:
    """`dtype` of activations and cache. `bits` of the weights of matrices, None when they have that dtype as well.

    `gate`: what is asked of it against transformers in fp32 before anything is published; None where rounding is the
    point, and its cost is reported instead.
    """

    name: str
    dtype: str
    bits: int | None
    gate: Gate | None


PRECISIONS: Mapping[str, Precision] = {
    precision.name: precision
    for precision in (
        Precision("fp32", "F32", None, Gate(1e-4, same_text=True)),
        Precision("fp16", "F16", None, Gate(2e-2, same_text=False)),
        Precision("int8", "F32", 8, None),
        Precision("int4", "F32", 4, None),
    )
}

EXACT = PRECISIONS["fp32"]


@dataclass(frozen=True)
class Blocks:
    """How matrices are rounded: `size` inputs share a scale; `accuracy_level` 4 multiplies in int8, 0 in floats.

    A table that is embedding and head at once is rounded for both unless `keep_embeddings`.
    """

    size: int = BLOCK
    accuracy_level: int = 4
    keep_embeddings: bool = False


@dataclass(frozen=True)
class Exported:
    """A published folder. `context_length`: tokens of the longest text that the graph reads."""

    manifest: Manifest
    agreement: Agreement
    context_length: int


def export_onnx(
    model: Path,
    out: Path,
    *,
    precision: Precision,
    blocks: Blocks,
    probes: list[list[int]],
    origin: Mapping[str, Any],
    card: Callable[[Agreement, int], str],
    trust_remote_code: bool,
    positions: int | None = None,
    last_logits: bool = False,
    link: bool = False,
    refitted: Mapping[str, TensorInfo] | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
    placement: Placement = ON_CPU,
) -> Exported:
    """Publish the model folder `model` for ONNX Runtime and onnxruntime-genai.

    `probes`: token ids to run before publishing, and before any rounding. `card` writes the model card, from what that
    run found and the longest text in tokens, which `positions` shortens. `last_logits` computes the logits of the last
    token alone. With `link` unchanged weight files become second names of the source's. `placement` bounds
    memory and threads of the run; it computes on the CPU.

    Raises UnsupportedModelError for what the kernels cannot compute, ParityError when the graph does not compute what
    transformers does, InputError for an `out` that is, holds or lies in `model`, or positions that it does not have.
    """
    refuse_existing(out, overwrite=overwrite, reads=(model,))
    # Writing needs neither torch nor the model classes, and little memory; running against transformers does.
    from sspcompile.export.onnx.check import NEW_TOKENS, PROBE_TOKENS, check_runs

    demand_runtime()
    decoder = read_decoder(model, positions=positions)
    run = partial(
        check_runs,
        model=model,
        probes=probes,
        positions=decoder.positions,
        trust_remote_code=trust_remote_code,
        placement=placement,
        progress=progress,
    )
    with staged(out, overwrite=overwrite, reads=(model,)) as folder:
        if precision != EXACT:
            unrounded = partial(run, gate=EXACT.gate, dtype=EXACT.dtype)
            prove_structure(decoder, folder, PROBE_TOKENS + NEW_TOKENS, unrounded, last_logits=last_logits)
        written = decoder.with_tensors(refitted or {})
        write_graph(written, folder, precision, blocks, last_logits=last_logits, link=link, progress=progress)
        check_graph(folder)
        agreement = run(folder, gate=precision.gate, dtype=precision.dtype)
        (folder / CHECKS).write_text(json.dumps(asdict(agreement), indent=1) + "\n", "utf-8")
        (folder / "README.md").write_text(card(agreement, decoder.positions), "utf-8")
        told = described(decoder, precision, blocks, last_logits=last_logits) | ({REFITTED: True} if refitted else {})
        return Exported(write_manifest(folder, {**origin, **told}), agreement, decoder.positions)


def described(decoder: Decoder, precision: Precision, blocks: Blocks, *, last_logits: bool) -> dict[str, Any]:
    """What the manifest says of the graph."""
    found: dict[str, Any] = {
        "sspcompile": sspcompile.__version__,
        "format": "onnx",
        "precision": precision.name,
        "context_length": decoder.positions,
    }
    if precision.bits is not None:
        found |= {**asdict(blocks), "activations": precision.dtype.replace("F", "fp")}
    if last_logits:
        found["last_logits"] = True
    return found


def write_graph(
    decoder: Decoder,
    folder: Path,
    precision: Precision,
    blocks: Blocks,
    *,
    last_logits: bool = False,
    link: bool = False,
    progress: Progress = silent,
) -> None:
    """Weights, graph, configuration and tokenizer: all that a runtime reads. One band of one tensor is in memory."""
    weights, quantised = _place(decoder, folder, precision, blocks, link, progress)
    rotary = write_rotary(folder, decoder.frequencies, decoder.rotary_scale, decoder.positions, precision.dtype)
    graph = emit(decoder, weights, quantised, rotary, precision.dtype, last_logits=last_logits)
    (folder / GRAPH).write_bytes(graph.SerializeToString())
    write_beside(decoder, folder)


def write_beside(decoder: Decoder, folder: Path) -> None:
    """Configuration, tokenizer and settings, which belong to every graph."""
    copy_companions(decoder.folder, folder)
    drop_references(folder)
    shutil.copyfile(Path(__file__).with_name(OPTIMUM), folder / OPTIMUM)
    config = without_code(decoder.config)
    if decoder.positions != positions_of(config):
        # optimum, and whoever else reads this file, learns the limit from it.
        config["max_position_embeddings"] = decoder.positions
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    (folder / SETTINGS).write_text(json.dumps(genai_config(decoder), indent=2) + "\n", "utf-8")


def check_graph(folder: Path, name: str = GRAPH) -> None:
    """ONNX's own checker, on the graph and the places of its weights.

    The checker refuses files with several names, and hard links are such files. It is shown empty files of the same
    sizes instead.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for file in filter(Path.is_file, folder.iterdir()):
            if file.name == name:
                shutil.copyfile(file, Path(scratch) / name)
            else:
                (Path(scratch) / file.name).touch()
                os.truncate(Path(scratch) / file.name, file.stat().st_size)
        onnx.checker.check_model(str(Path(scratch) / name))


def _place(
    decoder: Decoder, folder: Path, precision: Precision, blocks: Blocks, link: bool, progress: Progress
) -> tuple[dict[str, Placed], dict[str, Quantised]]:
    tensors = used_tensors(decoder.tensors, tied=decoder.geometry.tied)
    if precision.bits is None and {info.dtype for info in tensors.values()} == {precision.dtype}:
        progress("weights", 0, 1)
        placed = share_weights(tensors, decoder.folder, folder, link=link)
        progress("weights", 1, 1)
        return placed, {}
    total, done = sum(info.nbytes for info in tensors.values()), 0

    def wrote(count: int) -> None:
        nonlocal done
        done = min(total, done + count)
        progress("weights", done, total)

    with DataFile(folder / DATA_FILE, wrote) as data:
        if precision.bits is None:
            return convert(tensors, data, precision.dtype), {}
        matrices, rest = _apart(decoder, tensors, blocks)
        return convert(rest, data, precision.dtype), quantise(
            matrices,
            data,
            precision.dtype,
            bits=precision.bits,
            block_size=blocks.size,
            accuracy_level=blocks.accuracy_level,
        )


def _apart(
    decoder: Decoder, tensors: Mapping[str, TensorInfo], blocks: Blocks
) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, TensorInfo]]:
    """The matrices to round, and what stays in floats."""
    matrices = _matrices(tensors, tied=decoder.geometry.tied)
    rounded = {name for parts in matrices.values() for name in parts}
    # Of a tied table the embeddings are looked up in the rounded head, where its rows are whole blocks.
    shared = not blocks.keep_embeddings and decoder.geometry.hidden % blocks.size == 0
    return matrices, {n: info for n, info in tensors.items() if n not in rounded or (n == EMBEDDING and not shared)}


def rounded_bytes(decoder: Decoder, precision: Precision, blocks: Blocks) -> int:
    """Bytes of the weights as `write_graph` writes them in a rounded precision; from the headers alone.

    Raises ValueError for a precision that rounds no matrices.
    """
    if precision.bits is None:
        raise ValueError(f"{precision.name} rounds no matrices")
    matrices, rest = _apart(decoder, used_tensors(decoder.tensors, tied=decoder.geometry.tied), blocks)
    shapes = [
        (sum(info.shape[0] for info in parts.values()), next(iter(parts.values())).shape[1])
        for parts in matrices.values()
    ]
    return data_bytes(
        [info.shape for info in rest.values()], shapes, precision.dtype, bits=precision.bits, block_size=blocks.size
    )


def _matrices(tensors: Mapping[str, TensorInfo], *, tied: bool) -> dict[str, dict[str, TensorInfo]]:
    """The matrices to round, under the name of their product: the head and every matrix of a layer.

    Those with the same input are one product, because every product costs a call and one more rounding of its input.
    """
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        if len(info.shape) != 2 or (name == EMBEDDING and not tied):
            continue
        stem, _, part = name.removesuffix(".weight").rpartition(".")
        joined = JOINED.get(part)
        found.setdefault(f"{stem}.{joined}.weight" if joined else name, {})[name] = info
    order = {part: number for number, part in enumerate(JOINED)}
    return {
        name: dict(sorted(parts.items(), key=lambda one: order.get(one[0].split(".")[-2], 0)))
        for name, parts in found.items()
    }
