"""The proof of a trimmed model: what was copied, how texts become tokens, and what the model makes of them.

1. Every tensor has the bytes of the source; row i of the tables those of row `kept[i]`.
2. The tokenizer that transformers makes of the folder has the tokens that stay, under their new ids; a text none of
   whose tokens went gets the same tokens, and any text gives the same text back.
3. From the same tokens both models compute the same logits for the tokens that stay, in float64, from a fresh load.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sspcompile.checkpoint import Checkpoint
from sspcompile.errors import ParityError
from sspcompile.model.exact import in_float64
from sspcompile.model.loading import load, load_tokenizer
from sspcompile.model.placement import ON_CPU, Placement, release
from sspcompile.progress import Steps, no_steps
from sspcompile.proof.parity import REPORT, Distance, Parity, demand
from sspcompile.proof.probes import random_probes
from sspcompile.proof.prove import goes_layerwise
from sspcompile.trimming.write import TABLES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Rows of a table that are compared at a time.
BAND = 4096


@dataclass(frozen=True)
class Trimmed:
    """What was checked: bytes of `tensors`; `texts` of `of` have the tokens that they had; logits, where there was
    room to compute them in float64."""

    tensors: int
    texts: int
    of: int
    parity: Parity | None

    @property
    def told(self) -> str:
        """In words."""
        found = f"{self.tensors} tensors byte for byte, the tokens of {self.texts} of {self.of} texts"
        if self.parity is None:
            return f"{found}; no room to compare logits"
        return f"{found}, logits within {self.parity.relative:.1e} of their scale ({self.parity.dtype})"


def check_rows(source: Checkpoint, written: Checkpoint, kept: Sequence[int], progress: Steps = no_steps) -> int:
    """Read both once. Raises ParityError for the first tensor that differs; gives the number of tensors."""
    if set(source.tensors) != set(written.tensors):
        strange = sorted(set(source.tensors) ^ set(written.tensors))[0]
        raise ParityError(f"{strange} is in one of the two models only.", hint=REPORT)
    for done, name in enumerate(source.tensors, 1):
        if not (_same_rows(source, written, name, kept) if name in TABLES else _same_bytes(source, written, name)):
            raise ParityError(f"{name} of the written model is not what the tokens that stay leave of it.", hint=REPORT)
        progress(done, len(source.tensors))
    return len(source.tensors)


def _same_rows(source: Checkpoint, written: Checkpoint, name: str, kept: Sequence[int]) -> bool:
    one, two = source.tensors[name], written.tensors[name]
    if two.dtype != one.dtype or two.shape != (len(kept), *one.shape[1:]):
        return False
    numbers = np.asarray(kept)
    for start in range(0, one.shape[0], BAND):
        stop = min(start + BAND, one.shape[0])
        first, last = np.searchsorted(numbers, (start, stop))
        if first == last:
            continue
        rows = source.read_rows(name, start, stop)[numbers[first:last] - start]
        if not np.array_equal(rows, written.read_rows(name, int(first), int(last))):
            return False
    return True


def _same_bytes(source: Checkpoint, written: Checkpoint, name: str) -> bool:
    one, two = source.tensors[name], written.tensors[name]
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    return all(first == second for first, second in zip(source.chunks(name), written.chunks(name), strict=True))


def check_tokenizer(
    source: PreTrainedTokenizerBase, folder: Path, kept: Sequence[int], texts: Sequence[str]
) -> tuple[int, int]:
    """(texts whose tokens stayed, texts). Raises ParityError for a token under another id, for a text that got other
    tokens though all of its own are there, and for one that does not come back."""
    written = load_tokenizer(folder)
    places = {number: place for place, number in enumerate(kept)}
    wanted = {token: places[number] for token, number in source.get_vocab().items() if number in places}
    # Some classes add a token of their own behind all others.
    found = {token: number for token, number in written.get_vocab().items() if number < len(kept)}
    if found != wanted:
        strange = sorted(set(found.items()) ^ set(wanted.items()))[0]
        raise ParityError(f"The written tokenizer differs at the token {strange[0]!r}.", hint=REPORT)
    same = 0
    for text in texts:
        old, new = (one(text, add_special_tokens=False)["input_ids"] for one in (source, written))
        whole = all(number in places for number in old)
        if whole and [places[number] for number in old] != new:
            raise ParityError(f"The written tokenizer reads {text[:60]!r} in another way.", hint=REPORT)
        if not whole and written.decode(new) != source.decode(old):
            raise ParityError(f"The written tokenizer does not give {text[:60]!r} back.", hint=REPORT)
        same += whole
    return same, len(texts)


def compare_logits(
    source: Checkpoint, folder: Path, kept: Sequence[int], progress: Steps = no_steps, *, placement: Placement = ON_CPU
) -> Parity | None:
    """Logits of both models on random texts of tokens that stay, in float64, one model in memory at a time.

    None where there is no room for that: then the comparison of bytes is all. Raises ParityError.
    """
    if goes_layerwise(source, placement):
        return None
    place = Placement(device=placement.exact_device, threads=placement.threads)
    numbers, probes, distance = torch.tensor(kept), random_probes(len(kept)), Distance()
    found = [one.cpu() for one in _logits(folder, probes, place)]
    progress(1, 2)
    old = [numbers[probe].tolist() for probe in probes]
    for one, other in zip(_logits(source.path, old, place), found, strict=True):
        distance.add(one[:, numbers.to(one.device)].cpu(), other)
    progress(2, 2)
    parity = distance.parity(len(probes), layerwise=False)
    demand(parity)
    return parity


@torch.inference_mode()
def _logits(folder: Path, probes: Sequence[Sequence[int]], placement: Placement) -> Iterator[Tensor]:
    """[T, V] for each probe."""
    release()  # the model before
    loaded = load(folder, fingerprint="", placement=placement, dtype=torch.float64)
    with in_float64():
        for probe in probes:
            yield loaded.model(input_ids=torch.tensor([list(probe)], device=loaded.device), use_cache=False).logits[0]
