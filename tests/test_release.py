"""A model that nobody needs any more is gone before something as large takes its place."""

from __future__ import annotations

import contextlib
import gc
import weakref
from functools import partial

import pytest
import torch
from builders import Shape, make_checkpoint, stated
from test_prepare_tools import tiny

import sspcompile
from sspcompile.model import loading
from sspcompile.model.hooks import answered, passed_over, without
from sspcompile.model.modules import attention
from sspcompile.model.placement import release
from sspcompile.model.recompute import recomputed
from sspcompile.model.swapping import swapped

FAST = {"max_tokens": 16, "continuation_tokens": 4}
SWAPS = {
    "without": lambda loaded: without(loaded.layers),
    "passed over": lambda loaded: passed_over(loaded.layers),
    "recomputed": lambda loaded: recomputed(loaded.layers),
    "answered": lambda loaded: answered(attention(loaded.layers[0]), torch.zeros(1)),
}


@pytest.fixture
def uncollected():
    """Without a collector that comes by on its own."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("swap", SWAPS)
def test_a_method_that_was_swapped_leaves_nothing_on_its_module(swap):
    loaded = tiny()
    before = {name: dict(vars(module)) for name, module in loaded.model.named_modules()}
    with SWAPS[swap](loaded):
        assert any("forward" in vars(module) for module in loaded.model.modules())
    assert {name: dict(vars(module)) for name, module in loaded.model.named_modules()} == before


def test_a_method_that_somebody_put_on_a_module_comes_back():
    (layer, *_) = tiny().layers
    with swapped(layer, print):
        own = layer.forward
        with swapped(layer, repr):
            assert layer.forward is repr
        assert layer.forward is own is print
    assert "forward" not in vars(layer)


def test_weights_are_dead_after_a_release(uncollected):
    loaded = tiny()
    weight = weakref.ref(loaded.layers[0].self_attn.o_proj.weight)
    loaded.layers[0].forward = loaded.layers[0].forward  # a circle, as streaming makes one
    del loaded
    release()
    assert weight() is None


def matrices_alive() -> int:
    return sum(issubclass(type(one), torch.nn.Linear) for one in gc.get_objects())


BUILD = partial(sspcompile.build, "model", "sums.yaml", baselines="none", **FAST)
COMMANDS = {
    "build": ("cutting", partial(BUILD, keep=0.5)),
    "nested": ("reordering", partial(BUILD, nested="1,0.8")),
    "trim": ("cutting", partial(sspcompile.trim, "model", "sums.yaml", out="trimmed", tokens=260, **FAST)),
}


@pytest.mark.parametrize("resident", [None, 1])  # layers in memory: of a whole model, and of one that lies on disk
@pytest.mark.parametrize("command", COMMANDS)
def test_the_dense_model_is_gone_when_its_weights_are_written(command, resident, tmp_path, uncollected, monkeypatch):
    monkeypatch.setattr(loading, "layers_that_fit", lambda *_: resident)
    make_checkpoint(tmp_path / "model", Shape(layers=3, hidden=64, kv_heads=4, head_dim=8))
    stated(tmp_path / "sums.yaml")
    before, (stage, run), alive = matrices_alive(), COMMANDS[command], []

    def progress(said: str, _done: int, _total: int) -> None:
        if said == stage and not alive:
            alive.append(matrices_alive() - before)

    with contextlib.chdir(tmp_path):
        run(progress=progress)
    assert alive and not any(alive)
