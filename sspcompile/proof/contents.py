"""The first part of the proof: what was copied has the bytes of the source, in the places of the heads that stay.

Which rows and columns belong to which head is read from the mask, apart from the code that cut them. A wrong number
in one weight of a hundred million may move no logit by more than rounding does, so it is looked for here.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sspcompile.checkpoint.headers import TensorInfo, read_words
from sspcompile.checkpoint.tensors import Blocks, attention_blocks, channel_blocks
from sspcompile.errors import ParityError
from sspcompile.progress import Steps, no_steps
from sspcompile.proof.claim import Claim
from sspcompile.proof.parity import REPORT

# Of one tensor in memory at a time, twice.
BAND_BYTES = 16 << 20


def check_contents(claim: Claim, progress: Steps = no_steps) -> None:
    """Read both folders once. Raises ParityError naming the first tensor that is not what the mask leaves of it."""
    source = {name: info for name, info in claim.checkpoint.tensors.items() if not claim.goes(name)}
    written = claim.there
    if lost := sorted(set(source) - set(written)):
        raise ParityError(f"The written model lacks {lost[0]}.", hint=REPORT)
    kept = _kept(claim)
    for number, (name, info) in enumerate(written.items()):
        if name not in source:  # a bias that the class of the source has not, and the class of the folder has
            right = name.endswith(".bias") and _is_zero(info)
        else:
            right = _is_left_of(source[name], kept.get(name), claim, name, info)
        if not right:
            raise ParityError(f"{name} of the written model is not what the mask leaves of the source's.", hint=REPORT)
        progress(number + 1, len(written))


def _kept(claim: Claim) -> dict[str, Blocks]:
    """What stays of the tensors that lose a part."""
    blocks: dict[str, Blocks] = {}
    mask = claim.mask
    for layer in mask.staying:
        if mask.channels is not None:
            blocks |= channel_blocks(claim.geometry, layer, mask.channels[layer])
        blocks |= attention_blocks(claim.geometry, layer, mask.kept[layer], mask.kept_groups(layer))
    return blocks


def _is_left_of(original: TensorInfo, blocks: Blocks | None, claim: Claim, name: str, info: TensorInfo) -> bool:
    shape = list(original.shape)
    if blocks is not None:
        shape[blocks.axis] = len(blocks.kept) * blocks.size
    if info.dtype != original.dtype or info.shape != tuple(shape):
        return False
    if name in claim.refitted:
        words = claim.refitted[name]
        return words is None or np.array_equal(words, read_words(info))
    return all(np.array_equal(left, found) for left, found in _pairs(original, blocks, info))


def _is_zero(info: TensorInfo) -> bool:
    return not any(read_words(info.band(*rows)).any() for rows in info.bands(BAND_BYTES))


def _pairs(original: TensorInfo, blocks: Blocks | None, info: TensorInfo) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Piece by piece, what should stand in a written tensor and what does."""
    axis, kept, size = blocks or (None, (), 1)
    if axis == 0:
        numbers = (np.array(kept)[:, None] * size + np.arange(size)).ravel()
        for start, stop in info.bands(BAND_BYTES):
            there = numbers[start:stop]
            first, last = int(there[0]), int(there[-1]) + 1
            yield read_words(original.band(first, last))[there - first], read_words(info.band(start, stop))
        return
    for rows in original.bands(BAND_BYTES):
        words = read_words(original.band(*rows))
        if axis == 1:  # [rows, blocks * size] -> [rows, kept * size]
            words = words.reshape(len(words), -1, size)[:, list(kept)].reshape(len(words), -1)
        yield words, read_words(info.band(*rows))
