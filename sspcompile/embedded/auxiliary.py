"""Throw-away losses that make the embedded model learn to read; nothing of them is in the shipped weights.

Each reads a middle layer through linear maps and the tied output matrix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from sspcompile.embedded.corpus import DOMAIN_DATA, DOMAINS
from sspcompile.embedded.corpus.shape import OWNERS
from sspcompile.embedded.network import HIDDEN

LOOKBACK = (1, 2, 3, 4, 5)
"""How many places back the early layer is asked about; names and what belongs to them stand so close."""
ECHO = (-4, -2, 2, 4)
"""Places around the earlier occurrence of a name, where scenes have the item, the amount or the owner."""
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


class Echo(nn.Module):
    """Asks, at the second occurrence of a name, what stood around the first.

    This is what reading needs (who is asked about, and what the text said near that name), asked directly.
    """

    def __init__(self, names: Tensor) -> None:
        """`names` [vocabulary] is true for tokens that end an owner's or an item's name."""
        super().__init__()
        self.names = names
        self.maps = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in ECHO)

    def forward(self, state: Tensor, tokens: Tensor, embedding: Tensor) -> Tensor:
        """Mean loss over the places; zero if no name of the batch occurs twice."""
        length = tokens.shape[1]
        same = (tokens.unsqueeze(2) == tokens.unsqueeze(1)).tril(-1)  # [rows, length, length]
        row, here = ((same.sum(2) == 1) & self.names[tokens]).nonzero(as_tuple=True)
        row, here = row[:ECHO_POSITIONS], here[:ECHO_POSITIONS]
        before = same[row, here].int().argmax(1)
        source = F.rms_norm(state[row, here], (HIDDEN,))
        losses = []
        for offset, linear in zip(ECHO, self.maps, strict=True):
            place = before + offset
            valid = (place >= 0) & (place < here) & (tokens[row, here] != tokens[row, place.clamp(0, length - 1)])
            if valid.any():
                logits = linear(source[valid]) @ embedding.T
                losses.append(F.cross_entropy(logits, tokens[row[valid], place[valid]]))
        return torch.stack(losses).sum() / len(ECHO) if losses else state.new_zeros(())


def name_tokens(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """True for the last token of every owner and item, [vocabulary]."""
    names = torch.zeros(len(tokenizer), dtype=torch.bool)
    items = [item for domain in DOMAINS for item in DOMAIN_DATA[domain].first.facts]
    for name in (*OWNERS, *items):
        names[tokenizer.encode(f" {name}")[-1]] = True
    return names
