"""Model cards say what was cut: heads, channels, or both."""

from __future__ import annotations

import pytest
from builders import Shape, make_checkpoint
from test_slicing_exact import mask_for

from sspcompile.checkpoint import Checkpoint
from sspcompile.export.card import slice_card
from sspcompile.slicing.mask import HeadMask
from sspcompile.slicing.plan import make_plan, plan_json

ORIGIN = {"source_name": "org/model"}


@pytest.fixture
def card(tmp_path):
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", Shape(kv_heads=4)))

    def made(keep: float, width: float, without: tuple[str, ...] = ()) -> str:
        mask: HeadMask = mask_for(checkpoint, keep, "uniform", 1, width)
        plan = {key: value for key, value in plan_json(make_plan(checkpoint, mask)).items() if key not in without}
        return slice_card(plan, mask, ORIGIN, "small")

    return made


def test_heads_and_channels_are_counted_and_tagged(card):
    text = " ".join(card(0.5, 0.75).split())
    assert "with 8 of its 16 attention heads and 24 of its 96 MLP channels cut out" in text
    assert "- attention-head-pruning - mlp-channel-pruning" in text


def test_a_cut_of_one_kind_is_not_tagged_as_the_other(card):
    heads, channels = card(0.5, 1.0), card(1.0, 0.5)
    assert "with 8 of its 16 attention heads cut out" in heads and "mlp-channel-pruning" not in heads
    assert "with 48 of its 96 MLP channels cut out" in channels and "attention-head-pruning" not in channels


def test_the_plan_of_an_earlier_version_says_nothing_of_channels(card):
    text = card(0.5, 1.0, without=("widths", "dense_width"))
    assert "with 8 of its 16 attention heads cut out" in text and "attention-head-pruning" in text
