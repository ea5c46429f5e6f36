"""The proof before any rounding: the graph with the checkpoint's own weights computes what transformers computes.

What rounding costs is reported and not judged, so nothing behind it could tell a wrong graph from a coarse one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sspcompile.errors import ParityError
from sspcompile.export.onnx.decoder import Decoder
from sspcompile.export.onnx.graph import emit
from sspcompile.export.onnx.weights import share_weights, used_tensors, write_rotary
from sspcompile.model.onnx_session import GRAPH

DTYPE = "F32"


def write_unrounded(decoder: Decoder, folder: Path, *, last_logits: bool = False) -> int:
    """Write the graph that computes in fp32 with the checkpoint's own weights; gives the bytes of those.

    Weights of other dtypes are read as they lie in the file and cast by the graph, so that nothing is converted; a
    second name of the files is enough where the file system has such.
    """
    used = used_tensors(decoder.tensors, tied=decoder.geometry.tied)
    shared = share_weights(used, decoder.folder, folder, link=True)
    rotary = write_rotary(folder, decoder.frequencies, decoder.rotary_scale, decoder.positions, DTYPE)
    graph = emit(decoder, shared, {}, rotary, DTYPE, last_logits=last_logits)
    (folder / GRAPH).write_bytes(graph.SerializeToString())
    return sum(info.nbytes for info in used.values())


def prove_structure(
    decoder: Decoder, beside: Path, positions: int, run: Callable[[Path], object], *, last_logits: bool
) -> None:
    """Write the fp32 graph into a scratch folder in `beside`, and `run` it there.

    `positions`: the longest text that `run` reads.

    Raises ParityError when the graph computes something else.
    """
    with tempfile.TemporaryDirectory(dir=beside) as scratch:
        folder = Path(scratch)
        short = replace(decoder, positions=min(positions, decoder.positions))
        write_unrounded(short, folder, last_logits=last_logits)
        try:
            run(folder)
        except ParityError as error:
            raise ParityError(
                f"Before any rounding: {error.message}", hint="Please report this with the model's config.json."
            ) from error
