"""Which tokens a scenario needs, and what a text loses where one of them goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from sspcompile.errors import BudgetError
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.logits import decoder_output, rows_at_once
from sspcompile.model.text import Sentence, batches_of
from sspcompile.progress import Steps, no_steps
from sspcompile.trimming.tokenizer import Bpe, with_parts

# Matrices with a number of rows that this divides are fast everywhere.
MULTIPLE = 64
# How much texts of all domains count beside the scenario: a token that stands once in a hundred thousand of theirs goes
# before one that the scenario would write once in a million.
GENERAL = 0.1


@dataclass(frozen=True)
class Use:
    """What texts make of a vocabulary. All arrays are [V] float64.

    `read`: how often a token stands in them. Over the scored positions, `mass`: the sum of the probabilities that the
    model gives a token, and `first`: how often it is the most probable one.
    """

    read: np.ndarray
    mass: np.ndarray
    first: np.ndarray

    @property
    def tokens(self) -> float:
        return float(self.read.sum())

    @property
    def positions(self) -> float:
        return float(self.first.sum())

    def loss(self, kept: np.ndarray) -> TokenLoss:
        """What goes with the tokens that are not in the mask `kept`, bool [V]."""
        gone = ~kept
        return TokenLoss(
            changed=float(self.first[gone].sum()) / max(1.0, self.positions),
            mass=float(self.mass[gone].sum()) / max(1.0, self.positions),
            read=float(self.read[gone].sum()) / max(1.0, self.tokens),
        )


@dataclass(frozen=True)
class TokenLoss:
    """Shares in [0, 1]. `changed`: of the scored positions, those whose most probable token went. `mass`: the mean
    probability that went. `read`: of the tokens of the texts, those that went and are read in pieces."""

    changed: float
    mass: float
    read: float

    @property
    def worst(self) -> float:
        """What a bound on the loss is held against."""
        return max(self.changed, self.read)


@torch.inference_mode()
def use_of(loaded: LoadedModel, items: Sequence[Sentence], progress: Steps = no_steps) -> Use:
    """One pass over the texts. Logits exist for a slice of the scored positions at a time."""
    read = np.bincount([token for item in items for token in item.ids], minlength=loaded.vocab).astype(float)
    mass, first = torch.zeros(loaded.vocab, dtype=torch.float64), torch.zeros(loaded.vocab, dtype=torch.float64)
    batches = batches_of(loaded, items)
    for done, batch in enumerate(batches, 1):
        hidden = decoder_output(loaded, batch)
        states = hidden[batch.score_mask.to(hidden.device)]
        for part in states.split(rows_at_once(loaded)):
            logits = loaded.logits_of(part)
            mass += torch.softmax(logits, dim=-1).sum(0).double().cpu()
            first += torch.bincount(logits.argmax(-1).cpu(), minlength=loaded.vocab)
        progress(done, len(batches))
    return Use(read, mass.numpy(), first.numpy())


@dataclass(frozen=True)
class TokenOrder:
    """`order`: all tokens, the ones to keep first, each behind its parts; the first `needed` of them stay always.
    `rows`: of the table, which may have some without a token."""

    order: np.ndarray
    needed: int
    rows: int

    @cached_property
    def _rank(self) -> np.ndarray:
        rank = np.full(self.rows, self.rows)
        rank[self.order] = np.arange(len(self.order))
        return rank

    def first(self, count: int) -> np.ndarray:
        """The mask of the first `count` tokens, bool [V]."""
        return self._rank < count

    def rounded(self, count: int) -> int:
        """The next multiple of MULTIPLE, as far as there are tokens."""
        return min(-(-max(count, self.needed) // MULTIPLE) * MULTIPLE, len(self.order))

    def within(self, use: Use, bound: float) -> int:
        """The smallest count for which no share of `use` that `TokenLoss.worst` looks at exceeds `bound`."""
        lost = [1 - np.cumsum(values[self.order]) / max(1.0, float(values.sum())) for values in (use.first, use.read)]
        # Sums of shares end a rounding away from 1.
        enough = np.nonzero(np.maximum(*lost) <= bound + 1e-12)[0]
        return self.rounded(int(enough[0]) + 1 if len(enough) else len(self.order))

    def demand(self, count: int) -> int:
        """`count`, rounded down to a multiple of MULTIPLE where that is possible. Raises BudgetError for too few."""
        if count < self.needed:
            raise BudgetError(
                f"{count:,} tokens are less than the {self.needed:,} that any text needs: bytes and special tokens.",
                hint=f"Give --tokens {self.rounded(self.needed)} or more, or leave it to --max-loss.",
            )
        lower = count // MULTIPLE * MULTIPLE
        return min(lower if lower >= self.needed else count, len(self.order))


def token_order(bpe: Bpe, scenario: Use, general: Use, needed: frozenset[int]) -> TokenOrder:
    """Order the tokens by what the scenario's texts make of them, and far behind by what texts of all domains do.

    A token counts by its share of what is read and of the probability of what is written; ties go to the smaller id,
    which is the more frequent one in general. Ids without a token (rows that pad the table) are not in the order unless
    `needed`.
    """
    worth = _worth(scenario) + GENERAL * _worth(general)
    ranked = [number for number in np.lexsort((np.arange(len(worth)), -worth)).tolist() if number in bpe.tokens]
    found = dict.fromkeys(sorted(needed))
    for number in ranked:
        if number not in found:
            found.update(dict.fromkeys(with_parts(bpe, number, found)))
    return TokenOrder(np.array(list(found)), len(needed), len(worth))


def _worth(use: Use) -> np.ndarray:
    return _shares(use.read) + _shares(use.mass)


def _shares(values: np.ndarray) -> np.ndarray:
    return values / max(1.0, float(values.sum()))
