"""Token ids against the embedding table, which may be shorter than the tokenizer or longer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from sspcompile.errors import InputError
from sspcompile.request.documents import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def padding_id(tokenizer: PreTrainedTokenizerBase, vocab: int) -> int:
    """What stands in masked places: the tokenizer's padding or end token where the table of `vocab` rows has it.

    Any row would do, since no real token sees it. A row there must be: some tokenizers name a padding token that was
    never given one.
    """
    return first_within((tokenizer.pad_token_id, tokenizer.eos_token_id, 0), vocab) or 0


def first_within(ids: Iterable[object], vocab: int) -> int | None:
    """The first id that a table of `vocab` rows has."""
    return next((i for i in ids if isinstance(i, int) and 0 <= i < vocab), None)


def declared_ends(declared: object, vocab: int) -> list[int]:
    """The end tokens that a configuration declares, one or a list, without those that a table of `vocab` rows lacks."""
    ids = declared if isinstance(declared, list) else [declared]
    return [token for one in ids if (token := first_within([one], vocab)) is not None]


def ends_of(declared: object, tokenizer: PreTrainedTokenizerBase, vocab: int) -> frozenset[int]:
    """The token ids at which transformers' `generate` stops: those that the generation configuration declares.

    The tokenizer's own end token is asked only for a model that declares none, which would never stop.
    """
    return frozenset(declared_ends(declared, vocab) or declared_ends(tokenizer.eos_token_id, vocab))


def end_id(tokenizer: PreTrainedTokenizerBase, ends: Iterable[int], vocab: int) -> int | None:
    """What closes a text: the tokenizer's end token, else the first of `ends`; None where the model has none."""
    return first_within((tokenizer.eos_token_id, *sorted(ends)), vocab)


def demand_rows(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...], vocab: int) -> None:
    """Raise InputError for a token that has no row in the table of `vocab` rows."""
    strange = next((token for token in ids if not 0 <= token < vocab), None)
    if strange is None:
        return
    text = shown(str(tokenizer.decode(list(ids))))
    raise InputError(
        f"The text {text} holds the token {tokenizer.convert_ids_to_tokens(strange)!r} (id {strange}), and the "
        f"model has {vocab} tokens, up to id {vocab - 1}.",
        hint="Leave it out (--raw where the chat template writes it), or use the tokenizer that the model was trained "
        "with.",
    )


def same_tokens(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase, vocab: int) -> bool:
    """Whether two tokenizers give the same ids to all tokens for which a table of `vocab` rows has one."""
    found = ({token: i for token, i in t.get_vocab().items() if i < vocab} for t in (first, second))
    return next(found) == next(found)
