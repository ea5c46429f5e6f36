"""Weighing as GGUF: both models with the numbers that their files stand for, read by transformers in fp32.

No file is written, and llama.cpp need not be there; it rounds activations too, alike for all, and that is left out.
Bytes are those of the files that this package writes: llama.cpp's own quantiser gives the table of q4_0 fewer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import transformers

from sspcompile.checkpoint.headers import TensorInfo, read_words
from sspcompile.evaluate.rounding import SIDES, Form, Pair, Side
from sspcompile.export.gguf.rounding import TYPES, as_floats, nbytes
from sspcompile.export.gguf.source import Source, read_source
from sspcompile.export.gguf.weights import written_tensors
from sspcompile.model.blocks import GGUF_ROUNDINGS
from sspcompile.model.decoder import LanguageModel, TextModel
from sspcompile.model.loading import load_cut
from sspcompile.model.placement import ON_CPU, Placement
from sspcompile.model.rounding import rounded_embedding, rounded_products
from sspcompile.model.text import Batch, Sentence, batches_of
from sspcompile.model.weights import replaced
from sspcompile.progress import Progress


@dataclass
class GgufScales:
    """`evaluate.rounding.Scales` of GGUF."""

    pair: Pair
    placement: Placement = ON_CPU

    @property
    def runtime(self) -> str:
        return f"transformers {transformers.__version__} with matrices rounded as in a GGUF"

    @cached_property
    def _sources(self) -> Mapping[Side, Source]:
        return {side: read_source(self.pair.folder(side)) for side in SIDES}

    @property
    def positions(self) -> int:
        return min(source.context for source in self._sources.values())

    @property
    def forms(self) -> tuple[Form, ...]:
        """Both models as stored and in every type that this package writes itself."""
        rounded = (Form(side, name) for side in SIDES for name in GGUF_ROUNDINGS)
        return (*map(Form, SIDES), *rounded)

    def tensors(self, side: Side) -> Mapping[str, TensorInfo]:
        return self._sources[side].tensors

    def lay(self, texts: Sequence[Sentence], scratch: Path, progress: Progress) -> Sequence[int]:
        return [self._bytes(form) for form in self.forms]

    def _bytes(self, form: Form) -> int:
        source = self._sources[form.of]
        if form.precision is None:
            return sum(info.nbytes for info in source.tensors.values())
        return sum(nbytes(one.kind, one.shape) for one in written_tensors(source, TYPES[form.precision]))

    def batches(self, model: LanguageModel, texts: Sequence[Sentence]) -> list[Batch]:
        return batches_of(model, texts)

    @contextlib.contextmanager
    def opened(self, form: Form) -> Iterator[LanguageModel]:
        model = load_cut(
            self.pair.folder(form.of),
            placement=replace(self.placement, dtype="float32"),
            trust_remote_code=self.pair.custom_code and form.of == "cut",
        )
        with contextlib.ExitStack() as stack:
            # Rounded first: of a weight that accelerate moves, `replaced` runs the product that it finds.
            if form.precision is not None:
                stack.enter_context(_rounded(model, form.precision, tied=self._sources[form.of].geometry.tied))
            for name, info in self.pair.refits(form).items():
                module = model.model.get_submodule(name.removesuffix(".weight"))
                stack.enter_context(replaced(module, {"weight": _tensor(info)}))
            yield model


@contextlib.contextmanager
def _rounded(model: TextModel, precision: str, *, tied: bool) -> Iterator[None]:
    """A whole model as its GGUF holds it: layers, embeddings and head."""
    rounding = GGUF_ROUNDINGS[precision]
    with (
        rounded_embedding(model, rounding, tied=tied),
        rounded_products(model.model.model.layers, rounding),
        rounded_products(model.model.lm_head, rounding.table),
    ):
        yield


def _tensor(info: TensorInfo) -> torch.Tensor:
    return torch.from_numpy(as_floats(read_words(info), info.dtype))
