"""Label-free quality: how far the next-token distribution of another model is from the dense model's.

The unit is the prompt: positions are averaged within a prompt first, and intervals resample prompts, because the
positions of one prompt are not independent. Nor are the turns of one conversation, or the answers of one question:
where it is known which prompts those are (`owners`), these are averaged first, and the conversation is the unit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sspcompile.errors import RunError
from sspcompile.intervals import Estimate, mean_estimate, share_estimate
from sspcompile.model.finite import demand_finite
from sspcompile.model.stored import in_double

MOST_NATS = 700.0  # e to more is no float
ROW_ELEMENTS = 8_000_000  # elements of one float64 block of logits: 64 MB


@dataclass(frozen=True)
class Divergence:
    """Of the other model from the dense one. KL in nats per token, agreement as a share of positions in [0, 1].

    The means are over conversations. The tuples hold one value per prompt, in ascending order of `prompts`.
    `reference_loss`: by how much its cross-entropy of reference answers is above the dense one's, in nats per token,
    for the prompts that have one; None without any. `owners` is the conversation of each prompt, `reference_owners` of
    each that has a reference; nothing where each has its own. `reply_loss` and `replies_per_prompt`: in nats per token,
    by how much the cross-entropy of a prompt's reference answer is above the dense one's, or of what the dense model
    would write where there is none, which is the KL.
    """

    mean_kl: Estimate
    top1_agreement: Estimate
    prompts: tuple[int, ...]
    kl_per_prompt: tuple[float, ...]
    agreement_per_prompt: tuple[float, ...]
    positions_per_prompt: tuple[int, ...]
    reference_loss: Estimate | None = None
    reference_per_prompt: tuple[float, ...] = ()
    owners: tuple[int, ...] = ()
    reference_owners: tuple[int, ...] = ()
    reply_loss: Estimate | None = None
    replies_per_prompt: tuple[float, ...] = ()

    @property
    def changed(self) -> Estimate:
        """The share of next tokens that are not the dense model's."""
        return self.top1_agreement.rest

    @property
    def perplexity(self) -> Estimate | None:
        """Of the reference answers, times the dense model's."""
        return None if self.reference_loss is None else _exp(self.reference_loss)

    @property
    def reply_perplexity(self) -> Estimate:
        """Of reference answers, and where there are none of what the dense model would write, times the dense model's:
        e to the mean over conversations, `reply_loss`.
        """
        return _exp(self.mean_kl if self.reply_loss is None else self.reply_loss)


def divergence(
    dense_logits: Tensor | np.ndarray,
    other_logits: Tensor | np.ndarray,
    prompt_index: Tensor | np.ndarray,
    *,
    seed: int = 0,
) -> Divergence:
    """Divergence at N scored positions. Logits are [N, V], `prompt_index` [N] names the prompt of each position.

    Raises ValueError when shapes do not fit, RunError when logits are not finite or there are no positions.
    """
    accumulator = DivergenceAccumulator()
    accumulator.add(dense_logits, other_logits, prompt_index)
    return accumulator.result(seed=seed)


class DivergenceAccumulator:
    """Collects batches, so that no more than one batch of logits is in memory."""

    def __init__(self) -> None:
        self._kl: dict[int, list[float]] = defaultdict(list)
        self._agree: dict[int, list[float]] = defaultdict(list)
        self._reference: dict[int, list[float]] = defaultdict(list)

    def add(
        self,
        dense_logits: Tensor | np.ndarray,
        other_logits: Tensor | np.ndarray,
        prompt_index: Tensor | np.ndarray,
        references: Tensor | None = None,
    ) -> None:
        """Add N positions; a prompt may be spread over batches. Raises like `divergence`.

        `references` [N]: the next token of a reference answer, below 0 where there is none.
        """
        dense, other = torch.as_tensor(dense_logits), torch.as_tensor(other_logits)
        index = torch.as_tensor(prompt_index).tolist()
        if dense.dim() != 2 or dense.shape != other.shape or len(index) != len(dense):
            raise ValueError(f"logits {tuple(dense.shape)} and {tuple(other.shape)} for {len(index)} positions")
        other = other.to(dense.device)
        agree = dense.argmax(-1) == other.argmax(-1)
        for prompt, k, a in zip(index, token_kl(dense, other).tolist(), agree.tolist(), strict=True):
            self._kl[prompt].append(k)
            self._agree[prompt].append(float(a))
        if references is not None:
            self._add_references(dense, other, index, references.to(dense.device))

    def _add_references(self, dense: Tensor, other: Tensor, index: list[int], references: Tensor) -> None:
        places = (references >= 0).nonzero()[:, 0]
        after, before = (_loss(one[places], references[places]) for one in (other, dense))
        for place, above in zip(places.tolist(), (after - before).tolist(), strict=True):
            self._reference[index[place]].append(above)

    def result(self, *, seed: int = 0, owners: Sequence[int] = ()) -> Divergence:
        """`owners`: the conversation of prompt 0, 1, ...; without them each is one. Raises RunError when nothing was
        added.
        """
        if not self._kl:
            raise RunError("There are no scored positions to compare.", hint="Give at least one prompt.")
        prompts = sorted(self._kl)
        kl = [float(np.mean(self._kl[p])) for p in prompts]
        references = {p: float(np.mean(losses)) for p, losses in self._reference.items()}
        agree = [float(np.mean(self._agree[p])) for p in prompts]
        answered = [p for p in prompts if p in self._reference]
        whose, of_answers = (_shared(owners, some) for some in (prompts, answered))
        positions = tuple(len(self._kl[p]) for p in prompts)
        replies = tuple(references.get(p, above) for p, above in zip(prompts, kl, strict=True))
        return Divergence(
            mean_kl=_mean(kl, whose, seed),
            top1_agreement=_share(agree, positions, whose, seed),
            prompts=tuple(prompts),
            kl_per_prompt=tuple(kl),
            agreement_per_prompt=tuple(agree),
            positions_per_prompt=positions,
            owners=whose,
            reply_loss=_mean(replies, whose, seed),
            replies_per_prompt=replies,
            **_references([references[p] for p in answered], of_answers, seed),
        )


def _shared(owners: Sequence[int], prompts: Sequence[int]) -> tuple[int, ...]:
    """The conversations of these prompts; nothing where each has its own."""
    found = tuple(owners[prompt] for prompt in prompts) if owners else ()
    return found if len({*found}) < len(found) else ()


def _by_owner(values: Sequence[float] | np.ndarray, owners: Sequence[int]) -> Sequence[float] | np.ndarray:
    """The mean over the prompts of every conversation."""
    if not owners:
        return values
    _, place = np.unique(owners, return_inverse=True)
    return np.bincount(place, weights=values) / np.bincount(place)


def _exp(nats: Estimate) -> Estimate:
    """Perplexities as a multiple, of a difference of cross-entropies; reports hold no infinity."""
    low, high = (None if end is None else float(np.exp(min(end, MOST_NATS))) for end in (nats.low, nats.high))
    return Estimate(float(np.exp(min(nats.value, MOST_NATS))), low, high)


def _mean(values: Sequence[float] | np.ndarray, owners: Sequence[int], seed: int) -> Estimate:
    """The mean over conversations."""
    return mean_estimate(_by_owner(values, owners), seed=seed)


def _share(shares: Sequence[float], positions: Sequence[int], owners: Sequence[int], seed: int) -> Estimate:
    """The same of shares of so many positions; texts of one conversation tell as much as one of their length."""
    return share_estimate(_by_owner(shares, owners), round(sum(_by_owner(positions, owners))), seed=seed)


def _references(losses: Sequence[float], owners: tuple[int, ...], seed: int) -> dict[str, Any]:
    loss = _mean(losses, owners, seed) if losses else None
    return {"reference_loss": loss, "reference_per_prompt": tuple(losses), "reference_owners": owners}


def token_kl(dense: Tensor, other: Tensor) -> Tensor:
    """KL(dense || other) of the next token in nats, [N] float64, from logits [N, V] of both on one device.

    Raises RunError when logits are not finite.
    """
    rows = max(1, ROW_ELEMENTS // max(1, dense.shape[1]))
    parts = zip(dense.split(rows), other.split(rows), strict=True)
    return torch.cat([_kl(a, b) for a, b in parts]) if len(dense) else torch.zeros(0, dtype=torch.float64)


def _loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of every token [N] under logits [N, V], float64."""
    exact = in_double(logits)  # on the CPU beside a device without float64
    return cross_entropy(exact, tokens.to(exact.device), reduction="none")


def _kl(dense: Tensor, other: Tensor) -> Tensor:
    # float64: the KL of nearly equal models is a difference of nearly equal numbers.
    p, q = in_double(dense).log_softmax(-1), in_double(other).log_softmax(-1)
    demand_finite("logits", p, q)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)


def average(divergences: Sequence[Divergence], *, seed: int = 0) -> Divergence:
    """The mean of several models on the same prompts, prompt by prompt. Raises ValueError for different prompts."""
    first = divergences[0]
    if any(other.prompts != first.prompts for other in divergences):
        raise ValueError("the models were measured on different prompts")
    kl = np.mean([d.kl_per_prompt for d in divergences], axis=0).tolist()
    agree = np.mean([d.agreement_per_prompt for d in divergences], axis=0).tolist()
    replies = np.mean([d.replies_per_prompt for d in divergences], axis=0).tolist()
    return replace(
        first,
        mean_kl=_mean(kl, first.owners, seed),
        top1_agreement=_share(agree, first.positions_per_prompt, first.owners, seed),
        kl_per_prompt=tuple(kl),
        agreement_per_prompt=tuple(agree),
        reply_loss=_mean(replies, first.owners, seed),
        replies_per_prompt=tuple(replies),
        **_references(
            np.mean([d.reference_per_prompt for d in divergences], axis=0).tolist(), first.reference_owners, seed
        ),
    )


def compare_divergences(first: Divergence, second: Divergence, *, seed: int = 0) -> Estimate:
    """Paired over prompts, in nats per token: the KL of `first` minus the KL of `second`; over conversations as there.

    Raises ValueError for different prompts.
    """
    if first.prompts != second.prompts:
        raise ValueError("the two were measured on different prompts")
    gaps = np.subtract(first.kl_per_prompt, second.kl_per_prompt)
    return _mean(gaps, first.owners, seed)
