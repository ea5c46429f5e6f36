"""Weighing in ONNX Runtime: both models written by the ONNX exporter, and read as their users read them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from sspcompile.checkpoint.headers import TensorInfo
from sspcompile.evaluate.rounding import SIDES, Form, Pair, Side
from sspcompile.export.onnx.check import check_runs
from sspcompile.export.onnx.decoder import LEAST_POSITIONS, Decoder, read_decoder
from sspcompile.export.onnx.structure import DTYPE, write_unrounded
from sspcompile.export.onnx.weights import DATA_FILE
from sspcompile.export.onnx.write import EXACT, PRECISIONS, Blocks, rounded_bytes, write_graph
from sspcompile.model.decoder import LanguageModel
from sspcompile.model.loading import load_tokenizer
from sspcompile.model.onnx_session import OnnxModel, demand_runtime
from sspcompile.model.onnx_text import OnnxText
from sspcompile.model.placement import ON_CPU, Placement
from sspcompile.model.text import Batch, Sentence, batches_of
from sspcompile.progress import Progress

ROUNDED = tuple(name for name, precision in PRECISIONS.items() if precision.bits is not None)
# Coarser blocks have fewer scales: how a dense model gets to the bytes of a cut without losing a unit.
COARSER = (64, 128, 256)
# Of one batch, scored or not: 128 MiB in fp32.
BATCH_LOGITS = 2**25


def forms_of(dense: Decoder, cut: Decoder, precision: str) -> tuple[Form, ...]:
    """Both models as stored and in every rounded precision. Where the cut, rounded to `precision`, is smaller than the
    dense one, also the dense one in the finest coarser blocks that take no more bytes than that, if there are such.
    """
    forms = [Form(side) for side in SIDES] + [Form(side, name) for side in SIDES for name in ROUNDED]
    rounding, usual = PRECISIONS[precision], Blocks()
    most = rounded_bytes(cut, rounding, usual)
    if rounded_bytes(dense, rounding, usual) > most:
        fits = (block for block in COARSER if rounded_bytes(dense, rounding, Blocks(block)) <= most)
        forms += [Form("dense", precision, block) for block in (next(fits, None),) if block is not None]
    return tuple(forms)


@dataclass
class OnnxScales:
    """`evaluate.rounding.Scales` of ONNX Runtime. The unrounded graphs must compute what transformers does before
    anything is compared: `lay` raises ParityError, and what the exporter raises.
    """

    pair: Pair
    placement: Placement = ON_CPU
    _places: dict[Form, Path] = field(default_factory=dict)

    @property
    def runtime(self) -> str:
        import onnxruntime

        return f"ONNX Runtime {onnxruntime.__version__}"

    @cached_property
    def _decoders(self) -> Mapping[Side, Decoder]:
        return {side: read_decoder(self.pair.folder(side)) for side in SIDES}

    @property
    def positions(self) -> int:
        return min(decoder.positions for decoder in self._decoders.values())

    @cached_property
    def forms(self) -> tuple[Form, ...]:
        return forms_of(self._decoders["dense"], self._decoders["cut"], self.pair.precision)

    def tensors(self, side: Side) -> Mapping[str, TensorInfo]:
        return self._decoders[side].tensors

    def lay(self, texts: Sequence[Sentence], scratch: Path, progress: Progress) -> Sequence[int]:
        demand_runtime()
        positions, sizes = max(LEAST_POSITIONS, *(len(text.ids) for text in texts)), []
        for number, form in enumerate(self.forms):
            progress("rounding", number, len(self.forms))
            decoder = replace(self._decoders[form.of], positions=positions)
            self._places[form] = scratch / str(number)
            sizes.append(_write(decoder.with_tensors(self.pair.refits(form)), self._places[form], form))
        progress("rounding", len(self.forms), len(self.forms))
        by_length = sorted(texts, key=lambda text: len(text.ids))
        for side in SIDES:
            check_runs(
                self._places[Form(side)],
                self.pair.folder(side),
                [by_length[0].ids, by_length[-1].ids],
                gate=EXACT.gate,
                positions=positions,
                dtype=DTYPE,
                trust_remote_code=self.pair.custom_code and side == "cut",
                placement=replace(self.placement, device="cpu", dtype="float32", device_map=None),
                progress=progress,
            )
        return sizes

    def batches(self, model: LanguageModel, texts: Sequence[Sentence]) -> list[Batch]:
        return batches_of(model, texts, max(1, BATCH_LOGITS // model.vocab))

    @contextlib.contextmanager
    def opened(self, form: Form) -> Iterator[LanguageModel]:
        session = OnnxModel.open(self._places[form], threads=self.placement.threads)
        yield OnnxText(session, load_tokenizer(self.pair.dense), frozenset())


def _write(decoder: Decoder, folder: Path, form: Form) -> int:
    """Gives the bytes of the weights."""
    folder.mkdir()
    if form.precision is None:
        return write_unrounded(decoder, folder)
    write_graph(decoder, folder, PRECISIONS[form.precision], Blocks(form.block))
    return (folder / DATA_FILE).stat().st_size
