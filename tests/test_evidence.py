"""Which texts may choose and which may judge."""

from __future__ import annotations

import numpy as np
import pytest

from sspcompile.compile.mixture import Mixture
from sspcompile.domains import DomainPool
from sspcompile.pipeline.evidence import (
    FIT_PROMPTS,
    HELD_PROMPTS,
    OWN_FIT_PROMPTS,
    OWN_HELD_PROMPTS,
    fit_part,
    gather,
    split,
)

NAMES = ("a", "b", "c")
POOLS = tuple(DomainPool(name, name, (), tuple(f"{name} {n}" for n in range(100))) for name in NAMES)


def mixture(*weights: float, unknown: float = 0.0) -> Mixture:
    return Mixture(NAMES, np.array(weights), 0.0, unknown, {})


@pytest.mark.parametrize("own", [0, 3, 20, 200, 5000])
def test_no_text_chooses_and_judges(own):
    evidence = gather([f"mine {n}" for n in range(own)], mixture(0.7, 0.3, 0.0), POOLS, 0)
    assert not set(evidence.fit) & set(evidence.held)
    learned = {prompt for pool in fit_part(POOLS) for prompt in pool.prompts}
    assert not learned & set(evidence.held)
    assert len(evidence.fit) <= max(FIT_PROMPTS, OWN_FIT_PROMPTS)
    assert len(evidence.held) <= max(HELD_PROMPTS, OWN_HELD_PROMPTS)


def test_own_prompts_come_first_and_pools_fill_up_in_the_proportion_of_the_mixture():
    evidence = gather([f"mine {n}" for n in range(8)], mixture(0.75, 0.25, 0.0), POOLS, 0)
    assert (evidence.own_fit, evidence.own_held) == (6, 2)
    assert evidence.fit[:6] == ("mine 0", "mine 1", "mine 2", "mine 4", "mine 5", "mine 6")
    rest = [text[0] for text in evidence.fit[6:]]
    assert rest.count("a") == pytest.approx(3 * rest.count("b"), abs=2)
    assert rest.count("c") == 0


def test_an_unknown_scenario_is_filled_up_from_all_domains_alike():
    evidence = gather([], mixture(1.0, 0.0, 0.0, unknown=1.0), POOLS, 0)
    counts = [sum(text.startswith(name) for text in evidence.fit) for name in NAMES]
    assert counts == [FIT_PROMPTS // 3] * 3


def test_splitting_takes_every_fourth_text_and_loses_none():
    fit, held = split([str(n) for n in range(10)])
    assert held == ("3", "7")
    assert sorted((*fit, *held), key=int) == [str(n) for n in range(10)]
