"""A cut that is rounded beside the dense model that is only rounded: what both lose, for how many bytes of weights.

Both are written by the ONNX exporter and read the same texts in ONNX Runtime. The reference is the dense model with its
weights as they are stored, computed in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sspcompile.checkpoint.headers import TensorInfo
from sspcompile.checkpoint.tensors import EMBEDDING
from sspcompile.errors import InputError
from sspcompile.export.onnx.check import check_runs
from sspcompile.export.onnx.decoder import LEAST_POSITIONS, Decoder, read_decoder
from sspcompile.export.onnx.structure import DTYPE, write_unrounded
from sspcompile.export.onnx.weights import DATA_FILE
from sspcompile.export.onnx.write import EXACT, PRECISIONS, Blocks, rounded_bytes, write_graph
from sspcompile.model.divergence import Divergence, DivergenceAccumulator
from sspcompile.model.loading import load_tokenizer
from sspcompile.model.onnx_session import OnnxModel, demand_runtime
from sspcompile.model.onnx_text import OnnxText
from sspcompile.model.placement import ON_CPU, Placement
from sspcompile.model.text import Batch, Sentence, batches_of
from sspcompile.progress import Progress, silent
from sspcompile.select.judging import references_of

Side = Literal["dense", "cut"]
ROUNDED = tuple(name for name, precision in PRECISIONS.items() if precision.bits is not None)
USUAL = Blocks()
# Coarser blocks have fewer scales: how a dense model gets to the bytes of a cut without losing a unit.
COARSER = tuple(replace(USUAL, size=size) for size in (64, 128, 256))
# Of one batch, scored or not: 128 MiB in fp32.
BATCH_LOGITS = 2**25
# The dense model's, which the others are held against, model after model: 1 GiB in fp32.
HELD_LOGITS = 2**28


@dataclass(frozen=True)
class Form:
    """A model as it is written: the dense one or the cut, as stored, or rounded with `blocks` to a `precision`."""

    of: Side
    precision: str | None = None
    blocks: Blocks = USUAL


@dataclass(frozen=True)
class Weighed:
    """`weight_bytes`: of the weights in its files. `precision`: what they were rounded to, or are stored in. The
    divergence is that from the dense model as it is stored."""

    form: Form
    precision: str
    weight_bytes: int
    divergence: Divergence


def forms_of(dense: Decoder, cut: Decoder, precision: str) -> tuple[Form, ...]:
    """Both models as stored and in every rounded precision. Where the cut, rounded to `precision`, is smaller than the
    dense one, also the dense one in the finest coarser blocks that take no more bytes than that, if there are such.
    """
    sides: tuple[Side, ...] = ("dense", "cut")
    forms = [Form(side) for side in sides] + [Form(side, name) for side in sides for name in ROUNDED]
    rounding = PRECISIONS[precision]
    most = rounded_bytes(cut, rounding, USUAL)
    if rounded_bytes(dense, rounding, USUAL) > most:
        fits = (blocks for blocks in COARSER if rounded_bytes(dense, rounding, blocks) <= most)
        forms += [Form("dense", precision, blocks) for blocks in (next(fits, None),) if blocks is not None]
    return tuple(forms)


def weigh(
    dense: Path,
    cut: Path,
    texts: Sequence[Sentence],
    precision: str,
    scratch: Path,
    *,
    refitted: Mapping[str, TensorInfo] | None = None,
    custom_code: bool = False,
    seed: int = 0,
    placement: Placement = ON_CPU,
    progress: Progress = silent,
) -> tuple[Weighed, ...]:
    """Write both model folders in all forms into the empty folder `scratch`, and read the texts with each. `refitted`:
    matrices of the cut that were fitted for that `precision`, which are rounded in the place of its own.

    The unrounded graphs must compute what transformers does before anything is compared. Texts longer than the models'
    positions are left out. Raises InputError where none is left or ONNX Runtime is not installed,
    UnsupportedModelError for what it cannot compute, and ParityError.
    """
    demand_runtime()
    folders: dict[Side, Path] = {"dense": dense, "cut": cut}
    decoders = {side: read_decoder(folder) for side, folder in folders.items()}
    longest = min(decoder.positions for decoder in decoders.values())
    read = [text for text in texts if len(text.ids) <= longest]
    if not read:
        raise InputError(
            f"Every text that judges the build is longer than the {longest} tokens that the model reads.",
            hint="Build with a smaller --max-tokens.",
        )
    positions = max(LEAST_POSITIONS, *(len(text.ids) for text in read))
    decoders = {side: replace(decoder, positions=positions) for side, decoder in decoders.items()}
    forms = forms_of(decoders["dense"], decoders["cut"], precision)
    places, sizes = [scratch / str(number) for number in range(len(forms))], []
    for number, (form, place) in enumerate(zip(forms, places, strict=True)):
        progress("rounding", number, len(forms))
        asked = (form.of, form.precision) == ("cut", precision)
        sizes.append(_write(decoders[form.of].with_tensors((asked and refitted) or {}), place, form))
    progress("rounding", len(forms), len(forms))
    by_length = sorted(read, key=lambda text: len(text.ids))
    for form, place in list(zip(forms, places, strict=True))[: len(folders)]:
        check_runs(
            place,
            folders[form.of],
            [by_length[0].ids, by_length[-1].ids],
            gate=EXACT.gate,
            positions=positions,
            dtype=DTYPE,
            trust_remote_code=custom_code and form.of == "cut",
            placement=placement,
            progress=progress,
        )
    found = _divergences(places, dense, read, seed=seed, threads=placement.threads, progress=progress)
    names = [form.precision or stored_name(decoders[form.of]) for form in forms]
    return tuple(map(Weighed, forms, names, sizes, found))


def stored_name(decoder: Decoder) -> str:
    """`bf16` and so on: what the embeddings are stored in."""
    return decoder.tensors[EMBEDDING].dtype.lower().replace("f", "fp", 1).replace("bfp", "bf")


def _write(decoder: Decoder, folder: Path, form: Form) -> int:
    """Gives the bytes of the weights."""
    folder.mkdir()
    if form.precision is None:
        return write_unrounded(decoder, folder)
    write_graph(decoder, folder, PRECISIONS[form.precision], form.blocks)
    return (folder / DATA_FILE).stat().st_size


def _divergences(
    places: Sequence[Path],
    dense: Path,
    texts: Sequence[Sentence],
    *,
    seed: int,
    threads: int | None,
    progress: Progress,
) -> list[Divergence]:
    """Of every written model from the first one. One of them is in memory at a time."""
    tokenizer = load_tokenizer(dense)

    def opened(place: Path) -> OnnxText:
        return OnnxText(OnnxModel.open(place, threads=threads), tokenizer, frozenset())

    first = opened(places[0])
    batches = batches_of(first, texts, max(1, BATCH_LOGITS // first.vocab))
    parts = list(_parts(batches, HELD_LOGITS // first.vocab))
    del first
    collected = [DivergenceAccumulator() for _ in places]
    done, total = 0, len(parts) * len(places)
    for part in parts:
        expected: list[Tensor] = []
        for place, other in zip(places, collected, strict=True):
            asked = opened(place)
            found = [asked.scored_logits(one.input_ids, one.attention_mask, one.score_mask) for one in part]
            expected = expected or found
            for batch, wanted, logits in zip(part, expected, found, strict=True):
                owner = torch.tensor(batch.rows)[batch.score_mask.nonzero()[:, 0]]
                other.add(wanted, logits, owner, references_of(batch, texts))
            done += 1
            progress("weighing", done, total)
    return [one.result(seed=seed) for one in collected]


def _parts(batches: Sequence[Batch], most: int) -> Iterator[list[Batch]]:
    """Runs of batches with at most so many scored positions, at least one batch in each."""
    part: list[Batch] = []
    held = 0
    for batch in batches:
        scored = int(batch.score_mask.sum())
        if part and held + scored > most:
            yield part
            part, held = [], 0
        part.append(batch)
        held += scored
    yield part
