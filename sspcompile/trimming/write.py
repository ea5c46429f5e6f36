"""A model folder without some tokens: the rows of embedding and head that stay, and every file that names ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sspcompile.checkpoint import Checkpoint, copy_companions, write_checkpoint
from sspcompile.checkpoint.references import TOKENIZER_CONFIG, drop_references, read_settings
from sspcompile.checkpoint.settings import END_TOKENS, GENERATION, ONE_TOKEN, read_generation
from sspcompile.checkpoint.tensors import EMBEDDING, LM_HEAD
from sspcompile.checkpoint.transfer import Extent
from sspcompile.checkpoint.writer import OutputTensor
from sspcompile.errors import UnsupportedModelError
from sspcompile.slicing.cut import runs
from sspcompile.trimming.tokenizer import FILE, Bpe, dump_tokenizer

TABLES = (EMBEDDING, LM_HEAD)
# Other forms of the whole vocabulary: a reader that found one would number tokens in the old way.
WHOLE = (
    *("vocab*", "merges*", "*.model", "*.model.v*", "*.tiktoken", "*.spm", "*.bpe"),
    *("bpe.codes", "dict.txt", "encoder.json", "tekken*.json"),
)
ADDED, DECODER = "added_tokens.json", "added_tokens_decoder"
# Lists of ids from which tokens that went may be missing.
LISTS = ("suppress_tokens", "begin_suppress_tokens")
# What else names tokens by id in generation_config.json; nobody who trims has been seen to need it.
UNTAKEN = ("bad_words_ids", "forced_decoder_ids", "sequence_bias", "forced_bos_token_id", "forced_eos_token_id")


def named_ids(checkpoint: Checkpoint) -> frozenset[int]:
    """The ids that configuration and generation configuration name. Raises UnsupportedModelError for what `trim` cannot
    renumber: a model that sees, and lists of ids with a meaning of their own."""
    if "text_config" in checkpoint.config:
        raise UnsupportedModelError(
            f"{checkpoint.path} holds more than a decoder, and its other parts name tokens by id.",
            hint="`trim` takes language models. `build` cuts the decoder of this one.",
        )
    generation = read_generation(checkpoint.path) or {}
    if strange := [key for key in UNTAKEN if generation.get(key)]:
        raise UnsupportedModelError(
            f"{checkpoint.path / GENERATION} names tokens under {strange[0]}, which `trim` does not take.",
            hint="Take the entry out, if the deployment can do without it.",
        )
    found = {token for settings in (checkpoint.config, generation) for token in _special(settings)}
    return frozenset(token for token in found if 0 <= token < checkpoint.geometry.vocab)


def write_trimmed(
    checkpoint: Checkpoint, bpe: Bpe, kept: Sequence[int], folder: Path, progress: Callable[[int], None] | None = None
) -> None:
    """Write weights, configuration and tokenizer with the tokens `kept`, ascending; the others are told apart no more.

    Row i of the new tables is row `kept[i]` of the old ones. Bytes are moved from file to file; no model is loaded.
    """
    places = {number: place for place, number in enumerate(kept)}
    write_checkpoint(folder, _tensors(checkpoint, kept), progress=progress)
    config = {**_renumbered(checkpoint.carried_config, places), "vocab_size": len(kept)}
    _dump(folder / "config.json", config)
    copy_companions(checkpoint.path, folder, wanted=lambda name: not any(Path(name).match(one) for one in WHOLE))
    drop_references(folder)
    if generation := read_generation(folder):
        _dump(folder / GENERATION, _renumbered(generation, places))
    (folder / FILE).write_text(dump_tokenizer(bpe.written(places)), "utf-8")
    if settings := read_settings(folder / TOKENIZER_CONFIG):
        told = settings.get(DECODER)
        if isinstance(told, dict):
            settings[DECODER] = {str(places[int(key)]): one for key, one in told.items() if int(key) in places}
        _dump(folder / TOKENIZER_CONFIG, settings)
    if added := read_settings(folder / ADDED):
        _dump(folder / ADDED, {token: places[number] for token, number in added.items() if number in places})


def _tensors(checkpoint: Checkpoint, kept: Sequence[int]) -> list[OutputTensor]:
    outputs = []
    for name, info in checkpoint.tensors.items():
        shape, extents, whole = info.shape, [info.extent], None
        if name in TABLES:
            shape = (len(kept), *info.shape[1:])
            extents = [info.rows(start, stop) for start, stop in runs(kept)]
        elif checkpoint.stored.get(name) == info:
            whole = info.extent
        outputs.append(OutputTensor(name, info.dtype, shape, _there(extents), unchanged=whole, shard=info.file.name))
    return outputs


def _there(extents: list[Extent]) -> Callable[[], list[Extent]]:
    return lambda: extents


def _is_special(key: str) -> bool:
    return key in (*ONE_TOKEN, END_TOKENS) or key.endswith("_token_id")


def _special(settings: Mapping[str, Any]) -> Iterator[int]:
    for key, value in settings.items():
        if _is_special(key):
            yield from (one for one in (value if isinstance(value, list) else [value]) if type(one) is int)


def _renumbered(settings: Mapping[str, Any], places: Mapping[int, int]) -> dict[str, Any]:
    """The same settings with new ids. An id outside the table stays what it was, outside of it."""
    found = dict(settings)
    for key, value in settings.items():
        if isinstance(value, list) and (key in LISTS or _is_special(key)):
            found[key] = [places[one] for one in value if one in places]
        elif _is_special(key) and type(value) is int:
            # A padding token beyond the table, as some models have: none is what it meant.
            found[key] = places.get(value)
    return found


def _dump(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def mask_of(kept: Sequence[int], vocab: int) -> np.ndarray:
    """bool [V], true at the tokens that stay."""
    mask = np.zeros(vocab, dtype=bool)
    mask[list(kept)] = True
    return mask
