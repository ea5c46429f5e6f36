"""The texts that a build looks at: which choose and repair, which guard the decisions, and which only judge.

A text is in one part only, with all texts of its conversation. What is decided on a text (layout, whether and how
strongly to repair) looks better there than elsewhere, so the texts that are reported decide nothing. The scenario's own
prompts come first; where they are less than ENOUGH of what is wanted, pool prompts fill up in the proportion of the
mixture, and the counts say so.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from fractions import Fraction
from itertools import pairwise
from math import ceil
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

from sspcompile.errors import ArtifactError, InputError
from sspcompile.request.conversations import Opening, asked_in, openings
from sspcompile.request.domains import DomainPool
from sspcompile.request.prompts import Prompt, bare

# A pool holds texts, a scenario conversations too.
Item = TypeVar("Item", bound=Prompt)
Text = TypeVar("Text")

FIT_PROMPTS = 96
GUARD_PROMPTS = 32
JUDGE_PROMPTS = 32
OFF_PROMPTS = 32
# Shares of these that the scenario's own prompts make up alone: what decides and judges is to be the scenario, and few
# prompts, a dozen positions each, tell more of it than many others do. Texts of one conversation decide and judge as
# one, because they tell the same once more.
ENOUGH = (1 / 2, 1 / 4, 1 / 4)
# A domain is another one where it has less than this share of an equal part of the mixture.
FOREIGN = 0.5
# So much of the texts that choose and repair is of protected domains, the same for each.
PROTECTED_SHARE = 0.25
# Of the scenario's own prompts no more than this are used; more would cost time and change little.
OWN_FIT_PROMPTS = 256
OWN_GUARD_PROMPTS = 96
OWN_JUDGE_PROMPTS = 96
# Of a pool every fourth text is held out; the held ones judge and guard in turn.
HOLD_EVERY = 4
# Of 65 to 255 own prompts more than a quarter is held out: enough for GUARD_PROMPTS and JUDGE_PROMPTS, as long as this
# many choose, and half at most. A dozen texts show a loss of 5 % no closer than to 1.5 %, and whoever asks for a bound
# pays for that in size.
OWN_CHOOSING = 48
# Of fewer prompts none is held out to guard with.
FEWEST = 2 * HOLD_EVERY


@dataclass(frozen=True)
class Protected:
    """Held-out texts of what a build must not lose: on `guard` that is decided, `judge` is reported only."""

    name: str
    guard: tuple[Prompt, ...]
    judge: tuple[Prompt, ...]


@dataclass(frozen=True)
class Splits:
    """`fit` chooses heads and fits the repair, `guard` decides between layouts and repairs, `judge` is reported only,
    and so is `off`: held-out prompts of the domains that the scenario is not about (none where it is about all).

    The first `own_fit`, `own_guard` and `own_judge` of them are the scenario's own prompts, and the last
    `protected_fit` of `fit` those of the domains in `protected`. `conversations`: those of its own, as `openings`.
    """

    fit: tuple[Prompt, ...]
    guard: tuple[Prompt, ...]
    judge: tuple[Prompt, ...]
    off: tuple[Prompt, ...]
    own_fit: int
    own_guard: int
    own_judge: int
    protected: tuple[Protected, ...] = ()
    protected_fit: int = 0
    conversations: Mapping[Prompt, Opening] = field(default_factory=dict)

    def owners(self, texts: Sequence[Prompt]) -> tuple[int, ...]:
        """The conversation of each of the texts, by number; a pool prompt is one of its own."""
        whose = [self.conversations.get(bare(text), text) for text in texts]
        number = {one: index for index, one in enumerate(dict.fromkeys(whose))}
        return tuple(number[one] for one in whose)

    def counts(self) -> dict[str, int]:
        """How many texts each part has, how many of them are the scenario's own, and where domains are protected how
        many are of those.
        """
        found = {
            "fit": len(self.fit),
            "guard": len(self.guard),
            "judge": len(self.judge),
            "off": len(self.off),
            "own_fit": self.own_fit,
            "own_guard": self.own_guard,
            "own_judge": self.own_judge,
        }
        if self.protected:
            found["protected_fit"] = self.protected_fit
            found["protected_guard"] = sum(len(one.guard) for one in self.protected)
            found["protected_judge"] = sum(len(one.judge) for one in self.protected)
        return found

    @property
    def every(self) -> tuple[Prompt, ...]:
        """All texts of the build, part by part."""
        spared = (text for one in self.protected for text in (*one.guard, *one.judge))
        return (*self.fit, *self.guard, *self.judge, *self.off, *spared)

    @property
    def of_protected(self) -> tuple[Prompt, ...]:
        """Those that choose and repair for protected domains."""
        return self.fit[len(self.fit) - self.protected_fit :]


class Holding(IntEnum):
    """Which texts are held out. Builds record how their own prompts were: earlier ones held out every fourth."""

    EVERY_FOURTH = 1
    SPACED = 2

    @classmethod
    def of(cls, origin: Mapping[str, Any]) -> Holding:
        """Of the build that a manifest's origin is of. Raises ArtifactError for one that only a later version knows."""
        known = origin.get("holding", cls.EVERY_FOURTH)
        if known not in [*cls]:
            raise ArtifactError(
                f"The build held its prompts out in way {known!r}, which this version does not know.",
                hint="Use the version that built it, or build it again.",
            )
        return cls(known)


def held_share(conversations: int) -> Fraction:
    """The share of a scenario's own conversations that is held out: a quarter of 64 or fewer and of 256 or more, and up
    to a half of those between.
    """
    if conversations <= OWN_CHOOSING:
        return Fraction(1, HOLD_EVERY)
    wanted = min(GUARD_PROMPTS + JUDGE_PROMPTS, conversations - OWN_CHOOSING)
    return min(max(Fraction(wanted, conversations), Fraction(1, HOLD_EVERY)), Fraction(1, 2))


def _places(count: int, holding: Holding) -> list[int]:
    """The part of every conversation: 0 fits, 1 guards, 2 judges."""
    if holding is Holding.EVERY_FOURTH:
        parts = (0, 0, 0, 2, 0, 0, 0, 1)
        return [parts[place % len(parts)] for place in range(count)]
    share, found = held_share(count), [0] * count
    held = int(count * share)
    edges = [ceil(number / share) for number in range(held + 1)]
    # A log may alternate between kinds of prompts: a fixed step would hold out one of them and choose on the other.
    rng = random.Random(0)
    chosen = [rng.randrange(first, behind) for first, behind in pairwise(edges)]
    for number in range(0, held, 2):
        two = chosen[number : number + 2]
        rng.shuffle(two)
        for part, place in zip((2, 1), two, strict=False):  # the last one alone judges
            found[place] = part
    return found


def split(
    texts: Sequence[Item], found: Mapping[Prompt, Opening] | None = None, holding: Holding = Holding.EVERY_FOURTH
) -> tuple[tuple[Item, ...], tuple[Item, ...], tuple[Item, ...]]:
    """(fit, guard, judge), each spread over all texts, so that a sorted file is split evenly. By `Holding.SPACED`
    `held_share` of the conversations guard or judge: one of each stretch of them, which is drawn, alike in every run.

    A text without messages is a conversation. The turns of one (`openings`) are in one part, and so are the answers of
    one question. Of fewer than eight conversations none guards, of fewer than four none judges, however many turns they
    have: pools fill up. `found`: their conversations, where they are known.
    """
    found = openings(texts) if found is None else found
    number = {opening: index for index, opening in enumerate(dict.fromkeys(found.values()))}
    places = _places(len(number), holding)
    parts: tuple[list[Item], list[Item], list[Item]] = ([], [], [])
    for text in texts:
        parts[places[number[found[bare(text)]]]].append(text)
    fit, guard, judge = map(tuple, parts)
    return fit, guard, judge


def seen_part(
    texts: Sequence[Prompt], found: Mapping[Prompt, Opening] | None = None, holding: Holding = Holding.EVERY_FOURTH
) -> tuple[Prompt, ...]:
    """Those of the texts that may have chosen, repaired or decided anything; what is left may be asked. Arguments as of
    `split`.
    """
    fit, guard, _ = split(texts, found, holding)
    return fit + guard


def seen(texts: Sequence[Prompt], holding: Holding = Holding.EVERY_FOURTH) -> frozenset[Opening]:
    """The conversations of `seen_part`."""
    found = openings(texts)
    return frozenset(found[bare(text)] for text in seen_part(texts, found, holding))


def fit_part(pools: Sequence[DomainPool]) -> tuple[DomainPool, ...]:
    """The pools without their held-out prompts: what `prepare` may learn from."""
    return tuple(replace(pool, prompts=split(pool.prompts)[0]) for pool in pools)


def own_fit_part(prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
    """The scenario's own prompts that may choose heads: neither repeated nor held out, OWN_FIT_PROMPTS at most."""
    return thinned(split(tuple(dict.fromkeys(prompts)), holding=Holding.SPACED)[0], OWN_FIT_PROMPTS)


def foreign(parts: np.ndarray) -> np.ndarray:
    """Which domains a scenario is not about, bool [K], by what each counts for."""
    return parts < FOREIGN / len(parts)


def draw_splits(
    prompts: Sequence[Prompt],
    parts: np.ndarray,
    pools: Sequence[DomainPool],
    seed: int,
    protect: Mapping[str, Sequence[DomainPool]] = MappingProxyType({}),
    *,
    holding: Holding = Holding.SPACED,
) -> Splits:
    """Splits for a scenario with these prompts of its own (none for a sentence or a given mixture).

    `parts` [K] is what each of the `pools` counts for; it sums to 1. `protect`: the pools of what is protected, by
    name; nothing else depends on them. `holding`: how its own prompts are held out. Raises InputError where the
    scenario's own prompts are all that one holds out, and where nothing guards or judges the scenario.
    """
    own, whose = asked_in(prompts), openings(prompts)
    # A pool prompt that the user happens to ask as well was seen by `prepare`, so it may not be held out.
    learned: set[Prompt] = {text for pool in fit_part(pools) for text in pool.prompts}
    parted = split(tuple(dict.fromkeys(prompts)), whose, holding)
    held = ([text for text in part if not asked_in((text,)) & learned] for part in parted[1:])
    own_fit, (own_guard, own_judge) = thinned(parted[0], OWN_FIT_PROMPTS), (tuple(part) for part in held)
    own_guard, own_judge = thinned(own_guard, OWN_GUARD_PROMPTS), thinned(own_judge, OWN_JUDGE_PROMPTS)
    rng = np.random.default_rng(seed)

    def drawn(part: int, weights: np.ndarray, count: int) -> tuple[Prompt, ...]:
        return _drawn(pools, part, whole_shares(weights, count), own, rng)

    def fill(part: int, have: int, wanted: int) -> tuple[Prompt, ...]:
        """Nothing where the scenario's own are ENOUGH: text of others would only blur what they say."""
        return drawn(part, parts, wanted - have) if have < ENOUGH[part] * wanted else ()

    def conversations(texts: Sequence[Prompt]) -> int:
        return len({whose[bare(text)] for text in texts})

    strange = foreign(parts).astype(float)
    fit = fill(0, len(own_fit), FIT_PROMPTS)
    guard = fill(1, conversations(own_guard), GUARD_PROMPTS)
    judge = fill(2, conversations(own_judge), JUDGE_PROMPTS)
    for what, texts in (("guard", own_guard + guard), ("judge", own_judge + judge)):
        if not texts:
            raise _nothing_to(what, [pool for pool, part in zip(pools, parts, strict=True) if part > 0])
    found = Splits(
        fit=own_fit + fit,
        guard=own_guard + guard,
        judge=own_judge + judge,
        off=drawn(2, strange, OFF_PROMPTS) if strange.any() else (),
        own_fit=len(own_fit),
        own_guard=len(own_guard),
        own_judge=len(own_judge),
        conversations=whose,
    )
    return _protecting(found, protect, own, rng) if protect else found


def _nothing_to(what: str, pools: Sequence[DomainPool]) -> InputError:
    counts = ", ".join(f"{pool.name} with {len(pool.prompts)} prompts" for pool in pools)
    return InputError(
        f"No prompt is left to {what} a build: the scenario holds out none of its own, and its pools ({counts}) none "
        "that it does not ask.",
        hint=f"Give the scenario {FEWEST} prompts that begin differently, or these pools {FEWEST} others.",
    )


def _drawn(
    pools: Sequence[DomainPool], part: int, counts: Sequence[int], taken: Collection[Prompt], rng: np.random.Generator
) -> tuple[str, ...]:
    """So many texts of a part of every pool, in the pool's order; what is `taken` is left out."""
    found: list[str] = []
    for count, pool in zip(counts, pools, strict=True):
        texts = [text for text in split(pool.prompts)[part] if text not in taken]
        found += [texts[index] for index in np.sort(rng.permutation(len(texts))[:count])]
    return tuple(found)


def _protecting(
    splits: Splits, protect: Mapping[str, Sequence[DomainPool]], own: Collection[Prompt], rng: np.random.Generator
) -> Splits:
    """The splits with texts of what is protected: behind those that choose and repair PROTECTED_SHARE of them all, and
    apart from the scenario's as many as guard and judge that, as far as the pools go.
    """
    held, fit = [], list[Prompt]()
    for name, pools in protect.items():
        parts = [
            _drawn(pools, part, whole_shares(np.ones(len(pools)), wanted), own, rng)
            for part, wanted in ((1, GUARD_PROMPTS), (2, JUDGE_PROMPTS))
        ]
        if not all(parts):
            raise InputError(
                f"--protect {name}: all its held-out prompts are the scenario's own.",
                hint="Leave it out: those guard the build.",
            )
        held.append(Protected(name, *parts))
    wanted = whole_shares(np.ones(len(protect)), round(len(splits.fit) * PROTECTED_SHARE / (1 - PROTECTED_SHARE)))
    for count, pools in zip(wanted, protect.values(), strict=True):
        taken = {*map(bare, (*splits.fit, *fit)), *own}
        fit += _drawn(pools, 0, whole_shares(np.ones(len(pools)), count), taken, rng)
    return replace(splits, fit=(*splits.fit, *fit), protected=tuple(held), protected_fit=len(fit))


def thinned(texts: Sequence[Text], limit: int) -> tuple[Text, ...]:
    """At most `limit` of the texts, evenly spaced."""
    count = min(len(texts), limit)
    return tuple(texts[index * len(texts) // count] for index in range(count))


def whole_shares(weights: np.ndarray, count: int) -> list[int]:
    """Whole numbers in proportion to `weights` that sum to `count` (largest remainders), zeros when it is negative."""
    if count <= 0:
        return [0] * len(weights)
    exact = weights / weights.sum() * count
    shares = np.floor(exact).astype(int)
    for index in np.argsort(-(exact - shares), kind="stable")[: count - shares.sum()]:
        shares[index] += 1
    return [int(share) for share in shares]
