"""The texts that a build will read, by what they are for, and their tokens, before it is begun."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from sspcompile.model.decoder import LoadedModel
from sspcompile.model.text import ANSWER_TOKENS, sentences
from sspcompile.request.pools import pools_of
from sspcompile.request.prompts import Prompt, answer_of, is_open
from sspcompile.request.protecting import protected_pools
from sspcompile.request.request import Request
from sspcompile.request.splits import OFF_PROMPTS, draw_splits
from sspcompile.select.mixture import Mixture


class Lengths:
    """Tokens of prompts, each tokenised once."""

    def __init__(self, loaded: LoadedModel, max_tokens: int) -> None:
        self._loaded, self._max = loaded, max_tokens
        self._known: dict[Prompt, int] = {}
        self.longest = 0

    def of(self, prompts: Sequence[Prompt]) -> list[int]:
        new = list(dict.fromkeys(p for p in prompts if p not in self._known))
        read = sentences(self._loaded.tokenizer, new, self._max, self._loaded.rendering)
        self._known |= {prompt: len(item.ids) for prompt, item in zip(new, read, strict=True)}
        found = [self._known[prompt] for prompt in prompts]
        self.longest = max([self.longest, *found])
        return found

    def answers(self, prompts: Sequence[Prompt], new: int) -> list[int]:
        """Tokens of the reference answers, `new` where the dense model writes on."""
        given = [answer for prompt in prompts if (answer := answer_of(prompt)) is not None]
        read = iter(self._loaded.tokenizer(given)["input_ids"] if given else [])
        most = [new if is_open(p) else 0 if answer_of(p) is None else ANSWER_TOKENS for p in prompts]
        return [n if answer_of(p) is None else min(n, len(next(read))) for p, n in zip(prompts, most, strict=True)]

    def sum(self, prompts: Sequence[Prompt]) -> int:
        return sum(self.of(prompts))

    def mean(self, prompts: Sequence[Prompt]) -> float:
        return self.sum(prompts) / max(1, len(prompts))


class Part(NamedTuple):
    """Texts of a build that serve one purpose, and their tokens with what stands behind them."""

    texts: int
    tokens: int

    def some(self, most: int) -> Part:
        """So many of them, as long as they are on average."""
        count = min(self.texts, most)
        return Part(count, int(count * self.tokens / max(1, self.texts)))


@dataclass(frozen=True)
class Parts:
    """The texts of a build as `Splits` has them: of what is protected, `spared` decide and `told` judge. `every` are
    all prompts, `judged` those of `judge`.
    """

    fit: Part
    guard: Part
    judge: Part
    off: Part
    spared: Part
    told: Part
    every: tuple[Prompt, ...]
    judged: tuple[Prompt, ...]

    @property
    def reported(self) -> Part:
        """On and off the scenario."""
        return Part(self.judge.texts + self.off.texts, self.judge.tokens + self.off.tokens)


def parts_of(request: Request, lengths: Lengths, mixture: Mixture | None = None) -> Parts:
    """What will be read. Without the `mixture` texts of all pools alike stand in for those that it would draw."""
    options, given = request.options, pools_of(request.options)
    pools = given.candidates if mixture is None else given.named(mixture.domains)
    parts = np.full(len(pools), 1 / len(pools)) if mixture is None else mixture.parts
    # Without a mixture, what the scenario is not about stands for every domain.
    protect = protected_pools(options, np.zeros_like(parts) if mixture is None else parts, pools)
    splits = draw_splits(request.scenario.prompts, parts, pools, options.seed, protect)
    if mixture is None and not splits.off:
        splits = replace(splits, off=tuple(text for one in pools for text in one.prompts)[:OFF_PROMPTS])
    spared = [prompt for one in splits.protected for prompt in one.guard]
    told = [prompt for one in splits.protected for prompt in one.judge]
    fit, guard, judge, apart, decide, report = (
        Part(len(one), continued(one, lengths, options.continuation_tokens))
        for one in (splits.fit, splits.guard, splits.judge, splits.off, spared, told)
    )
    return Parts(fit, guard, judge, apart, decide, report, splits.every, splits.judge)


def continued(prompts: Sequence[Prompt], lengths: Lengths, new: int) -> int:
    """Tokens of prompts, and of what the model writes or reads behind them."""
    return lengths.sum(prompts) + sum(lengths.answers(prompts, new))
