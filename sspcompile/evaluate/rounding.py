"""A cut that is rounded beside the dense model that is only rounded: what both lose, for how many bytes of weights.

The reference is the dense model with its weights as they are stored, computed in fp32. In which runtime both read the
same texts, and what they are rounded to, is said by `Scales`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from sspcompile.checkpoint.headers import TensorInfo
from sspcompile.checkpoint.tensors import EMBEDDING
from sspcompile.errors import InputError
from sspcompile.model.blocks import BLOCK
from sspcompile.model.decoder import LanguageModel
from sspcompile.model.divergence import Divergence, DivergenceAccumulator
from sspcompile.model.placement import release
from sspcompile.model.text import Batch, Sentence
from sspcompile.progress import Progress, silent
from sspcompile.select.judging import references_of

Side = Literal["dense", "cut"]
SIDES: tuple[Side, ...] = ("dense", "cut")
# The dense model's, which the others are held against, model after model: 1 GiB in fp32.
HELD_LOGITS = 2**28


@dataclass(frozen=True)
class Pair:
    """Two model folders, and the `precision` that was asked for. `refitted`: matrices of the cut that were fitted for
    it, which are rounded in the place of its own. `custom_code`: the cut brings the class that loads it.
    """

    dense: Path
    cut: Path
    precision: str
    refitted: Mapping[str, TensorInfo]
    custom_code: bool = False

    def folder(self, side: Side) -> Path:
        return self.dense if side == "dense" else self.cut

    def refits(self, form: Form) -> Mapping[str, TensorInfo]:
        """The refitted matrices, where a form is the one that was asked for."""
        return self.refitted if (form.of, form.precision) == ("cut", self.precision) else {}


@dataclass(frozen=True)
class Form:
    """A model as it is read: the dense one or the cut, as stored, or rounded in blocks to a `precision`."""

    of: Side
    precision: str | None = None
    block: int = BLOCK


@dataclass(frozen=True)
class Weighed:
    """`weight_bytes`: of the weights in its files. `precision`: what they were rounded to, or are stored in. The
    divergence is that from the dense model as it is stored."""

    form: Form
    precision: str
    weight_bytes: int
    divergence: Divergence


class Scales(Protocol):
    """What a pair is weighed in. `runtime` names it to people, `positions` is the longest text of both models, and of
    the `forms` the dense model as it is stored comes first.
    """

    @property
    def pair(self) -> Pair: ...
    @property
    def runtime(self) -> str: ...
    @property
    def positions(self) -> int: ...
    @property
    def forms(self) -> tuple[Form, ...]: ...

    def tensors(self, side: Side) -> Mapping[str, TensorInfo]:
        """Those of a model as it is stored."""

    def lay(self, texts: Sequence[Sentence], scratch: Path, progress: Progress) -> Sequence[int]:
        """Make all forms ready to read `texts`, in the empty folder `scratch`; gives the bytes of their weights."""

    def batches(self, model: LanguageModel, texts: Sequence[Sentence]) -> list[Batch]:
        """The texts, as a model reads them."""

    def opened(self, form: Form) -> AbstractContextManager[LanguageModel]:
        """A form in memory."""


def weigh(
    scales: Scales,
    texts: Sequence[Sentence],
    scratch: Path,
    *,
    owners: Sequence[int] = (),
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[Weighed, ...]:
    """Read the texts with both models in all forms, which are laid into the empty folder `scratch`. `owners`: the
    conversations of the texts (nothing: each its own).

    Texts longer than the models' positions are left out. Raises InputError where none is left, and what `scales` raise.
    """
    places = [place for place, text in enumerate(texts) if len(text.ids) <= scales.positions]
    read, whose = [texts[place] for place in places], [owners[place] for place in places] if owners else ()
    if not read:
        raise InputError(
            f"Every text that judges the build is longer than the {scales.positions} tokens that the model reads.",
            hint="Build with a smaller --max-tokens.",
        )
    sizes = scales.lay(read, scratch, progress)
    found = _divergences(scales, read, whose, seed=seed, progress=progress)
    names = [form.precision or stored_name(scales.tensors(form.of)) for form in scales.forms]
    return tuple(map(Weighed, scales.forms, names, sizes, found))


def stored_name(tensors: Mapping[str, TensorInfo]) -> str:
    """`bf16` and so on: what the embeddings are stored in."""
    return tensors[EMBEDDING].dtype.lower().replace("f", "fp", 1).replace("bfp", "bf")


def _divergences(
    scales: Scales, texts: Sequence[Sentence], owners: Sequence[int], *, seed: int, progress: Progress
) -> list[Divergence]:
    """Of every form from the first one. One of them is in memory at a time."""
    parts = _parted(scales, texts)
    collected = [DivergenceAccumulator() for _ in scales.forms]
    done, total = 0, len(parts) * len(scales.forms)
    for part in parts:
        expected: list[Tensor] = []
        for form, other in zip(scales.forms, collected, strict=True):
            found = _logits(scales, form, part)
            expected = expected or found
            for batch, wanted, logits in zip(part, expected, found, strict=True):
                owner = torch.tensor(batch.rows)[batch.score_mask.nonzero()[:, 0].cpu()]
                other.add(wanted, logits, owner, references_of(batch, texts))
            done += 1
            progress("weighing", done, total)
    return [one.result(seed=seed, owners=owners) for one in collected]


def _parted(scales: Scales, texts: Sequence[Sentence]) -> list[list[Batch]]:
    release()  # of the model that wrote the texts
    with scales.opened(scales.forms[0]) as first:
        return list(_parts(scales.batches(first, texts), HELD_LOGITS // first.vocab))


def _logits(scales: Scales, form: Form, part: Sequence[Batch]) -> list[Tensor]:
    release()  # of the form before
    with scales.opened(form) as asked:
        return [asked.scored_logits(one.input_ids, one.attention_mask, one.score_mask) for one in part]


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
