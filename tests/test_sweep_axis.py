"""`--sweep`: which values an axis has, and what is said of one that makes no sense."""

from __future__ import annotations

import pytest

from sspcompile.api.sweep import MOST, read_axis
from sspcompile.errors import InputError


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("size=0.7:1:0.1", ("0.7", "0.8", "0.9", "1")),
        ("size=0.5:0.74:0.1", ("0.5", "0.6", "0.7")),
        ("size=0.9, 1", ("0.9", "1")),
        ("size=0.9,0.90,0.9", ("0.9",)),
        ("size=1:1:5", ("1",)),
        ("criterion=kl,fisher,kl", ("kl", "fisher")),
        ("max-params=1M,1000000", ("1M", "1000000")),
    ],
)
def test_values_are_those_that_were_typed(text, values):
    assert read_axis(text).values == values


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("size=0.5:1:1e-6", f"more than {MOST} values"),
        ("size=0.5:1:1e-9", f"more than {MOST} values"),
        ("size=0.5:1:5e-324", f"more than {MOST} values"),
        ("size=" + "0.5," * MOST + "0.5", f"more than {MOST} values"),
        ("criterion=" + "kl," * MOST + "kl", f"more than {MOST} values"),
        ("criterion=", "no values"),
        ("size=1:0.5:0.1", "starts above its stop"),
        ("size=0.5:1:0", "step that is not above 0"),
        ("size=0.5:1:-0.1", "step that is not above 0"),
        ("size=0.9,0.9000001,1", r"equal in six digits \(0.9 and 0.9000001\)"),
        ("size=0.5:0.5000001:2e-8", "equal in six digits"),
        ("size=0.5:1", "not numbers"),
        ("size=0.5:1:nan", "not numbers"),
        ("size=", "not numbers"),
    ],
)
def test_what_is_wrong_with_an_axis_is_said_as_it_is(text, said):
    with pytest.raises(InputError, match=said) as caught:
        read_axis(text)
    assert caught.value.hint


def test_no_value_is_merged_without_a_word():
    """Whatever is not refused has a build of its own for every number that was typed."""
    for step in (10.0**-power for power in range(1, 12)):
        wanted = [0.5 + number * step for number in range(5)]
        try:
            values = read_axis(f"size={','.join(map(repr, wanted))}").values
        except InputError:
            continue
        assert len(values) == len(wanted)
