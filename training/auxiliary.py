"""Throw-away losses that make the embedded model learn to read; nothing of them is in the shipped weights.

Each reads a middle layer through linear maps and the tied output matrix.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from training.corpus import DOMAIN_DATA, DOMAINS
from training.corpus.shape import OWNERS
from training.corpus.stories import AMOUNTS, scene_items
from training.network import HIDDEN

LOOKBACK = (1, 2, 3, 4, 5)
"""How many places back the early layer is asked about; names and what belongs to them stand so close."""
ECHO = (-4, -2, 2, 4)
"""Places around the earlier occurrence of a name, where scenes have the item, the amount or the owner."""
LINKS = ("precedes", "reads", "inspires", "copies", "helps")
HOP = (2, 4)
"""Places behind a name where a sentence has what it links to, and that one's amount."""
ECHO_POSITIONS = 160
"""At most so many positions per batch, which bounds the time."""


class Lookback(nn.Module):
    """Asks for the tokens that stand a few places before each chosen position."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in LOOKBACK)

    def forward(self, state: Tensor, tokens: Tensor, chosen: Tensor, embedding: Tensor) -> Tensor:
        """Mean loss over distances at the `chosen` [rows, length]; `state` is [rows, length, hidden]."""
        losses = []
        for distance, linear in zip(LOOKBACK, self.maps, strict=True):
            picked = chosen[:, distance:]
            source = F.rms_norm(state[:, distance:][picked], (HIDDEN,))
            losses.append(F.cross_entropy(linear(source) @ embedding.T, tokens[:, :-distance][picked]))
        return torch.stack(losses).mean()


def _repeated(tokens: Tensor, names: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, places and earlier places of at most ECHO_POSITIONS names that occur for the second time, each [found]."""
    same = (tokens.unsqueeze(2) == tokens.unsqueeze(1)).tril(-1)  # [rows, length, length]
    row, here = ((same.sum(2) == 1) & names[tokens]).nonzero(as_tuple=True)
    row, here = row[:ECHO_POSITIONS], here[:ECHO_POSITIONS]
    return row, here, same[row, here].int().argmax(1)


def _asked(
    maps: nn.ModuleList, source: Tensor, targets: list[Tensor], valid: list[Tensor], embedding: Tensor
) -> Tensor:
    """Sum over maps of the loss for `targets` at the valid positions, divided by the number of maps."""
    losses = [
        F.cross_entropy(linear(source[good]) @ embedding.T, target[good])
        for linear, target, good in zip(maps, targets, valid, strict=True)
        if good.any()
    ]
    return torch.stack(losses).sum() / len(maps) if losses else source.new_zeros(())


class Echo(nn.Module):
    """Asks, at the second occurrence of a name, what stood around the first.

    This is what reading needs (who is asked about, and what the text said near that name), asked directly.
    """

    def __init__(self, names: Tensor) -> None:
        """`names` [vocabulary] is true for tokens that end an owner's or an item's name, and for amounts."""
        super().__init__()
        self.names = names
        self.maps = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in ECHO)

    def forward(self, state: Tensor, tokens: Tensor, embedding: Tensor) -> Tensor:
        """Mean loss over the places; zero if no name of the batch occurs twice."""
        row, here, before = _repeated(tokens, self.names)
        targets, valid = [], []
        for offset in ECHO:
            place = before + offset
            target = tokens[row, place.clamp(0, tokens.shape[1] - 1)]
            targets.append(target)
            valid.append((place >= 0) & (place < here) & (tokens[row, here] != target))
        return _asked(self.maps, F.rms_norm(state[row, here], (HIDDEN,)), targets, valid, embedding)


class Hop(nn.Module):
    """Asks, at the second occurrence of a name, what lies several links behind it in the text.

    One step is learned quickly; without this, chains of two stay at chance for as long as was tried.
    """

    def __init__(self, names: Tensor, links: Tensor, steps: int) -> None:
        """`names` as for `Echo`; `links` [vocabulary] is true for verbs that link two names; `steps` is 2 or more."""
        super().__init__()
        self.names, self.links, self.steps = names, links, steps
        self.maps = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in HOP)

    def forward(self, state: Tensor, tokens: Tensor, embedding: Tensor) -> Tensor:
        """Mean loss over the places; zero if the batch has no chain."""
        row, here, place = _repeated(tokens, self.names)
        last = tokens.shape[1] - 1
        chained = torch.ones_like(here, dtype=torch.bool)
        for _ in range(1, self.steps):
            place, found = self._followed(tokens, row, here, place)
            chained &= found
        targets, valid = [], []
        for offset in HOP:
            targets.append(tokens[row, (place + offset).clamp(max=last)])
            valid.append(chained & (place + offset < here) & self.names[targets[-1]])
        return _asked(self.maps, F.rms_norm(state[row, here], (HIDDEN,)), targets, valid, embedding)

    def _followed(self, tokens: Tensor, row: Tensor, here: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Where the name that the sentence at `place` links to stands otherwise, and whether that is one place."""
        last = tokens.shape[1] - 1
        linked = place + 2
        places = torch.arange(last + 1, device=tokens.device)
        other = tokens[row] == tokens[row, linked.clamp(max=last)].unsqueeze(1)
        other &= (places < here.unsqueeze(1)) & (places != linked.unsqueeze(1))  # [found, length]
        chained = self.links[tokens[row, (place + 1).clamp(max=last)]] & (linked < here) & (other.sum(1) == 1)
        start = other.int().argmax(1)
        return start, chained & self.names[tokens[row, start]]


def name_tokens(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """True for the last token of every owner and item, and for every amount, [vocabulary]."""
    items = [item for domain in DOMAINS for item in scene_items(DOMAIN_DATA[domain])]
    amounts = map(str, range(AMOUNTS[0], AMOUNTS[1] + 1))
    return _last_tokens(tokenizer, (*OWNERS, *items, *amounts))


def link_tokens(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """True for the verbs of sentences that link a name to what another sentence begins with, [vocabulary]."""
    return _last_tokens(tokenizer, LINKS)


def _last_tokens(tokenizer: PreTrainedTokenizerFast, words: Iterable[str]) -> Tensor:
    found = torch.zeros(len(tokenizer), dtype=torch.bool)
    for word in words:
        found[tokenizer.encode(f" {word}")[-1]] = True
    return found
