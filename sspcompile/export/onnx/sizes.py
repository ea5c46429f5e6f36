"""A nested model for ONNX Runtime: a graph for every size, over one file of weights.

A matrix whose rows are units lies there as the checkpoint has it, one whose columns are (o_proj, down_proj)
transposed. So what a size keeps of any of them is a run of bytes that begins where the whole does. What the repair of a
size differs by lies behind the weights, and its graph adds it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sspcompile.checkpoint import Manifest, staged, write_manifest
from sspcompile.checkpoint.headers import TensorInfo
from sspcompile.checkpoint.replacing import refuse_existing
from sspcompile.export.agreement import Agreement
from sspcompile.export.onnx.decoder import Decoder, read_decoder
from sspcompile.export.onnx.graph import emit
from sspcompile.export.onnx.placed import Placed
from sspcompile.export.onnx.weights import DATA_FILE, DataFile, convert, transpose, used_tensors, write_rotary
from sspcompile.export.onnx.write import CHECKS, EXACT, Blocks, check_graph, described, write_beside
from sspcompile.families import layer_prefix
from sspcompile.model.onnx_session import SIZES, demand_runtime, graph_name
from sspcompile.model.placement import Placement
from sspcompile.nested.files import demand_class, read_repair
from sspcompile.nested.index import Member, Nested, read_nested
from sspcompile.nested.low_rank import INPUTS, OUTPUTS, LowRank, Stored, difference, numbers
from sspcompile.progress import Progress
from sspcompile.workspace import MODEL

WEIGHT = ".weight"


@dataclass(frozen=True)
class ExportedSizes:
    """A published folder, and by share how the graph of every size agrees with transformers."""

    manifest: Manifest
    agreements: Mapping[float, Agreement]
    context_length: int


def export_sizes(
    artifact: Path,
    out: Path,
    *,
    probes: list[list[int]],
    origin: Mapping[str, Any],
    card: Callable[[Agreement, int], str],
    placement: Placement,
    progress: Progress,
    positions: int | None = None,
    last_logits: bool = False,
    overwrite: bool = False,
) -> ExportedSizes:
    """Publish all sizes of a nested artifact, in fp32. Every graph is run against the model switched to its size.

    The parameters and what is raised are those of `export_onnx`.
    """
    refuse_existing(out, overwrite=overwrite, reads=(artifact,))
    from sspcompile.export.onnx.check import check_runs

    demand_runtime()
    demand_class(artifact / MODEL)
    nested, decoder = read_nested(artifact), read_decoder(artifact / MODEL, positions=positions)
    shares = [member.share for member in nested.members]
    run = partial(check_runs, model=artifact / MODEL, probes=probes, positions=decoder.positions, gate=EXACT.gate)
    with staged(out, overwrite=overwrite, reads=(artifact,)) as folder:
        _write(artifact, nested, decoder, folder, last_logits=last_logits, progress=progress)
        (folder / SIZES).write_text(json.dumps({"schema_version": 1, "sizes": shares}) + "\n", "utf-8")
        agreements = {}
        for share in shares:
            check_graph(folder, graph_name(share))
            agreements[share] = run(
                folder, dtype=EXACT.dtype, trust_remote_code=True, placement=placement, progress=progress, size=share
            )
        found = {f"{share:g}": asdict(one) for share, one in agreements.items()}
        (folder / CHECKS).write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        (folder / "README.md").write_text(card(agreements[shares[0]], decoder.positions), "utf-8")
        told = described(decoder, EXACT, Blocks(), last_logits=last_logits)
        return ExportedSizes(write_manifest(folder, {**origin, **told}), agreements, decoder.positions)


def _write(
    artifact: Path, nested: Nested, decoder: Decoder, folder: Path, *, last_logits: bool, progress: Progress
) -> None:
    """Weights, a graph for each size, and what belongs to all of them."""
    weights = _placed(artifact, nested, decoder, folder, progress)
    rotary = write_rotary(folder, decoder.frequencies, decoder.rotary_scale, decoder.positions, EXACT.dtype)
    for member, found in zip(nested.members, weights, strict=True):
        graph = emit(_sized(decoder, nested, member), found, {}, rotary, EXACT.dtype, last_logits=last_logits)
        (folder / graph_name(member.share)).write_bytes(graph.SerializeToString())
    write_beside(decoder, folder)


def _sized(decoder: Decoder, nested: Nested, member: Member) -> Decoder:
    counts = zip(decoder.layers, member.groups, member.widths, strict=True)
    layers = tuple(
        replace(layer, heads=groups * nested.group_size, kv_heads=groups, width=width)
        for layer, groups, width in counts
    )
    return replace(decoder, layers=layers)


def _placed(
    artifact: Path, nested: Nested, decoder: Decoder, folder: Path, progress: Progress
) -> list[dict[str, Placed]]:
    """Where the weights of every size lie in the file, which is written here."""
    tensors = used_tensors(decoder.tensors, tied=decoder.geometry.tied)
    total = sum(info.nbytes for info in tensors.values()) + sum(member.repair_bytes for member in nested.members)
    done = 0

    def wrote(count: int) -> None:
        nonlocal done
        done = min(total, done + count)
        progress("weights", done, total)

    sides = {f"{part.module}{WEIGHT}" for part in nested.parts if part.axis == 1}
    with DataFile(folder / DATA_FILE, wrote) as data:
        whole = _store(tensors, sides, data)
        dtypes = {name: info.dtype for name, info in tensors.items()}
        others = [_store_repair(read_repair(artifact, member), dtypes, data) for member in nested.members]
    return [_prefixes(whole, nested, member) | own for member, own in zip(nested.members, others, strict=True)]


def _store(tensors: Mapping[str, TensorInfo], sides: set[str], data: DataFile) -> dict[str, Placed]:
    """Matrices of the `sides` transposed, everything else as it is."""
    turned = {name: info for name, info in tensors.items() if name.partition(".layers.")[2].partition(".")[2] in sides}
    rest = {name: info for name, info in tensors.items() if name not in turned}
    return convert(rest, data, EXACT.dtype) | transpose(turned, data, EXACT.dtype)


def _store_repair(stored: Mapping[str, Stored], dtypes: Mapping[str, str], data: DataFile) -> dict[str, Placed]:
    """A size's refitted matrices: the factors of differences, or a matrix transposed. `dtypes`: of the dense ones."""
    found: dict[str, Placed] = {}

    def put(name: str, matrix: np.ndarray, *, turned: bool = False) -> None:
        matrix = np.ascontiguousarray(matrix.T if turned else matrix, dtype=np.float32)
        found[name] = replace(data.append([matrix], EXACT.dtype, matrix.shape), turned=turned)

    for name, one in stored.items():
        if isinstance(one, LowRank):
            module = name.removesuffix(WEIGHT)
            for factor, values in zip((OUTPUTS, INPUTS), difference(one), strict=True):
                put(module + factor, values)
        else:
            put(name, numbers(one, dtypes[name]), turned=True)
    return found


def _prefixes(whole: Mapping[str, Placed], nested: Nested, member: Member) -> dict[str, Placed]:
    """What a size keeps of the whole's tensors."""
    found = dict(whole)
    for layer, (groups, width) in enumerate(zip(member.groups, member.widths, strict=True)):
        rows = groups * nested.head_dim
        counts = {"query": rows * nested.group_size, "group": rows, "channel": width}
        for part in nested.parts:
            for kind in ("weight", "bias") if part.axis == 0 else ("weight",):
                name = f"{layer_prefix(layer)}{part.module}.{kind}"
                if name in whole:
                    found[name] = whole[name].first(counts[part.unit])
    return found
