"""An interrupted `prepare` goes on from what it had measured, and measures again whatever its inputs changed."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from test_prepare_tools import outside, pools, tiny

from sspcompile.errors import ToolkitError
from sspcompile.prepare import prepare
from sspcompile.prepare.stages import Stages
from sspcompile.prepare.toolkit import save

SETTINGS = {"criteria": ("fisher-greedy", "wanda"), "continuation_tokens": 2}


@pytest.fixture(scope="module")
def model():
    return tiny("qwen2", layers=2, hidden=32, heads=4, kv_heads=2, scale=0.1)


@contextlib.contextmanager
def forward_passes(model, stop_before: int | None = None):
    """How often the model's first layer was run; interrupted before the pass of that number."""
    count = [0]

    def hook(*_):
        if count[0] == stop_before:
            raise KeyboardInterrupt
        count[0] += 1

    handle = model.layers[0].register_forward_pre_hook(hook)
    try:
        yield count
    finally:
        handle.remove()


def written(toolkit, folder: Path) -> dict[str, bytes]:
    save(toolkit, folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    """The number of forward passes of a whole run, and what it writes."""
    with forward_passes(model) as count:
        toolkit = prepare(model, pools(), outside(), **SETTINGS)
    return count[0], written(toolkit, tmp_path_factory.mktemp("whole") / "toolkit")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.99])
def test_an_interrupted_prepare_goes_on_and_finds_what_an_undisturbed_one_finds(share, model, undisturbed, tmp_path):
    passes, whole = undisturbed
    kept = tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt), forward_passes(model, stop_before=int(share * passes)):
        prepare(model, pools(), outside(), **SETTINGS, stages=Stages(model, kept))
    with forward_passes(model) as resumed:
        stages = Stages(model, kept)
        again = prepare(model, pools(), outside(), **SETTINGS, stages=stages)
    assert resumed[0] == passes if share == 0 else resumed[0] < passes
    assert written(again, tmp_path / "again") == whole
    with forward_passes(model) as nothing:
        prepare(model, pools(), outside(), **SETTINGS, stages=stages)
    assert nothing[0] == 0
    stages.finish()
    assert not kept.exists()


@pytest.mark.parametrize(
    "change",
    [{"continuation_tokens": 3}, {"max_tokens": 8}, {"seed": 1}, {"pools": pools(11)}],
    ids=["continuations", "tokens", "seed", "pools"],
)
def test_what_a_changed_input_touches_is_measured_again(change, model, tmp_path):
    prepare(model, pools(), outside(), **SETTINGS, stages=Stages(model, tmp_path / "kept"))
    given = {"pools": pools(), **SETTINGS, **change}
    with forward_passes(model) as changed:
        stages = Stages(model, tmp_path / "kept")
        found = prepare(model, given.pop("pools"), outside(), **given, stages=stages)
    assert changed[0] > 0
    given = {"pools": pools(), **SETTINGS, **change}
    fresh = prepare(model, given.pop("pools"), outside(), **given)
    assert written(found, tmp_path / "found") == written(fresh, tmp_path / "fresh")


def test_a_stage_that_cannot_be_read_is_told(model, tmp_path):
    stages = Stages(model, tmp_path / "kept")
    prepare(model, pools(), outside(), **SETTINGS, stages=stages)
    for path in (tmp_path / "kept").iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(ToolkitError, match=r"cannot be read.*Remove .*kept"):
        prepare(model, pools(), outside(), **SETTINGS, stages=stages)
