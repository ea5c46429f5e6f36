"""tokenizer.json of a byte-pair encoding without some of its tokens.

Encoding merges the neighbours of lowest rank until nothing can be merged. A text in which no token occurs that went, on
the way to its tokens either, is encoded as before: every merge that it needed is there, in the same order, and none is
there that was not. So a token stays together with the tokens that it is merged from (`parts`), and what a text holds
beside them is read in smaller pieces, down to bytes. Which texts these are can be seen from their tokens alone.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from sspcompile.checkpoint.settings import read_json
from sspcompile.errors import UnsupportedModelError

FILE = "tokenizer.json"
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
# Sections of a post-processor that name a token as [text, id].
PAIRS = ("sep", "cls")


@dataclass(frozen=True)
class Bpe:
    """`document`: tokenizer.json as it stands. `ids`: token -> id, of the model and of the added tokens."""

    document: Mapping[str, Any]
    ids: Mapping[str, int]
    merges: tuple[tuple[str, str], ...]

    @property
    def model(self) -> Mapping[str, Any]:
        return self.document["model"]

    @cached_property
    def tokens(self) -> Mapping[int, str]:
        """Id -> token."""
        return {number: token for token, number in self.ids.items()}

    @cached_property
    def ranks(self) -> Mapping[tuple[str, str], int]:
        return {pair: rank for rank, pair in reversed(list(enumerate(self.merges)))}

    @cached_property
    def _made(self) -> Mapping[str, tuple[str, str] | None]:
        """Token -> the pair that it is merged from; None where there are several."""
        found: dict[str, tuple[str, str] | None] = {}
        for left, right in self.merges:
            found[left + right] = None if left + right in found else (left, right)
        return found

    @cached_property
    def named(self) -> frozenset[int]:
        """The ids that a section beside the model and the added tokens names."""
        return frozenset(_ids_in(self.document))

    def needed(self) -> frozenset[int]:
        """Tokens without which some text could not be read or some file would name a token that is gone: the added
        ones, the unknown token, and bytes or, where there are none, single characters."""
        kept = {one["id"] for one in self.document.get("added_tokens") or ()}
        kept |= {self.ids[name] for name in (str(self.model.get("unk_token")),) if name in self.ids}
        kept |= self.named
        falls_back = self.model.get("byte_fallback") and all(name in self.ids for name in BYTES)
        kept |= {self.ids[name] for name in BYTES if name in self.ids}
        if not falls_back:
            kept |= {number for token, number in self.ids.items() if len(token) == 1}
        return frozenset(kept)

    def unnamed(self, vocab: Mapping[str, int]) -> frozenset[int]:
        """Tokens that the file lacks and the class that reads it adds behind all others; `vocab` is token -> id."""
        return frozenset(number for token, number in vocab.items() if token not in self.ids)

    def parts(self, number: int) -> frozenset[int]:
        """The tokens that come up while the text of a token is merged, without itself; none of what no merge makes."""
        token = self.tokens.get(number)
        if token is None or token not in self._made:
            return frozenset()
        pair = self._made[token]
        found = self._simulated(token) if pair is None else {*pair, *self._names(pair[0]), *self._names(pair[1])}
        return frozenset(self.ids[name] for name in found if name in self.ids) - {number}

    def _names(self, token: str) -> set[str]:
        return {self.tokens[number] for number in self.parts(self.ids[token])} if token in self.ids else set()

    def _simulated(self, token: str) -> set[str]:
        """As the encoder goes: the pair of lowest rank first, of equal ones the leftmost."""
        symbols, found = list(token), set(token)
        while len(symbols) > 1:
            ranked = [(self.ranks[pair], at) for at, pair in enumerate(pairwise(symbols)) if pair in self.ranks]
            if not ranked:
                break
            at = min(ranked)[1]
            symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
            found.add(symbols[at])
        return found

    def written(self, places: Mapping[int, int]) -> dict[str, Any]:
        """tokenizer.json with the tokens in `places` alone, old id -> new id. Those of `needed` must be among them, as
        far as the table has rows for them."""
        model = dict(self.model)
        model["vocab"] = {token: places[number] for token, number in model["vocab"].items() if number in places}
        there = model["vocab"].keys()
        model["merges"] = [
            given
            for given, (left, right) in zip(self.model["merges"], self.merges, strict=True)
            if left in there and right in there and left + right in there
        ]
        # An added token may have an id behind the last row of the table: no model of this table can read it.
        added = self.document.get("added_tokens") or ()
        added = [{**one, "id": places[one["id"]]} for one in added if one["id"] in places]
        document = {**self.document, "added_tokens": added, "model": model}
        return {key: _renumbered(value, places) if key in NUMBERED else value for key, value in document.items()}


# Sections of tokenizer.json that name tokens by id, beside the model and the added tokens.
NUMBERED = ("post_processor", "padding")


def read_bpe(folder: Path) -> Bpe:
    """The tokenizer of a model folder. Raises UnsupportedModelError for one that is not a byte-pair encoding, and
    CheckpointError for a damaged file."""
    if not (folder / FILE).is_file():
        raise UnsupportedModelError(
            f"{folder} has no {FILE}.",
            hint="Save its tokenizer with transformers (`save_pretrained`), which writes one.",
        )
    document = read_json(folder / FILE)
    found = document.get("model")
    model: Mapping[str, Any] = found if isinstance(found, dict) else {}
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind != "BPE" or not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        raise UnsupportedModelError(
            f"The tokenizer of {folder} is not a byte-pair encoding but {kind or 'unnamed'}.",
            hint="`trim` takes models whose tokenizer.json has the type BPE. `build` cuts others.",
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UnsupportedModelError(
                f"The tokenizer of {folder} marks parts of words ({key}), which `trim` does not take.",
                hint="`build` cuts the model as it is.",
            )
    ids = {**model["vocab"], **{one["content"]: one["id"] for one in document.get("added_tokens") or ()}}
    merges = tuple((one[0], one[1]) if isinstance(one, list) else _pair(one) for one in model["merges"])
    return Bpe(document, ids, merges)


def with_parts(bpe: Bpe, number: int, known: Collection[int]) -> list[int]:
    """A token and those of its parts that are not `known` yet, the token last."""
    return [*sorted(part for part in bpe.parts(number) if part not in known), number]


def dump_tokenizer(document: Mapping[str, Any]) -> str:
    return json.dumps(document, ensure_ascii=False, indent=2) + "\n"


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _ids_in(document: Mapping[str, Any]) -> Iterator[int]:
    """Every id that a section beside the model and the added tokens names."""
    for key in NUMBERED:
        yield from _numbers(document.get(key))


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, dict):
        yield from (one for one in value.get("ids") or () if isinstance(one, int))
        yield from (value[key][1] for key in PAIRS if isinstance(value.get(key), list))
        yield from (value["pad_id"] for _ in range(1) if isinstance(value.get("pad_id"), int))
        for inner in value.values():
            yield from _numbers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner)


def _renumbered(value: Any, places: Mapping[int, int]) -> Any:
    """The same section with new ids where `_numbers` found old ones."""
    if isinstance(value, list):
        return [_renumbered(inner, places) for inner in value]
    if not isinstance(value, dict):
        return value
    found = {key: _renumbered(inner, places) for key, inner in value.items()}
    if isinstance(value.get("ids"), list):
        found["ids"] = [places[one] for one in value["ids"]]
    for key in PAIRS:
        if isinstance(value.get(key), list):
            found[key] = [value[key][0], places[value[key][1]]]
    if isinstance(value.get("pad_id"), int):
        found["pad_id"] = places[value["pad_id"]]
    return found
