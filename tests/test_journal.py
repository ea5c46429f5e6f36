"""Interrupted at any batch or layer, a stage goes on there: the same bits, and no pass too many."""

from __future__ import annotations

import contextlib
import os
import time
from functools import partial

import numpy as np
import pytest
import torch
from test_prepare_tools import pools, tiny

from sspcompile.criteria.measuring import measure
from sspcompile.errors import InputError, ParityError, RunError
from sspcompile.model import capture, journal, text
from sspcompile.model.blocks import OnnxRounding
from sspcompile.model.journal import Journal, claimed, holds_work, keeping, remove_old
from sspcompile.repair.fitting import fit_repairs
from sspcompile.slicing.mask import Kept

PROMPTS = [prompt for pool in pools(8) for prompt in pool.prompts]


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    """A handful of batches out of a few prompts."""
    monkeypatch.setattr(text.batches_of, "__defaults__", (40, None))
    monkeypatch.setattr(text.encode, "__defaults__", (text.MAX_TOKENS, 40))
    for name in ("BATCH_TOKENS", "GRADIENT_TOKENS"):
        monkeypatch.setattr(f"sspcompile.criteria.measuring.{name}", 40)
    monkeypatch.setattr(text.continued, "__defaults__", (text.CONTINUATION_TOKENS, text.MAX_TOKENS, 40, text.no_steps))


@pytest.fixture(scope="module")
def model():
    return tiny("qwen2", layers=4, hidden=32, heads=4, kv_heads=2, scale=0.3)


def features(model, progress):
    return [capture.features(model, PROMPTS, on_batch=progress)]


def continued(model, progress):
    found = text.continued(model, PROMPTS, 3, progress=progress)
    return [np.array(item.ids) for item in found]


def score(name, granularity, model, progress):
    items = text.sentences(model.tokenizer, PROMPTS, 32)
    directions = np.random.default_rng(0).normal(size=(4, 3, 32)).astype(np.float32)
    return [
        measure(model, name, items, directions=directions, seed=3, granularity=granularity, progress=progress).values
    ]


def texts_of(model):
    return text.encode(model, PROMPTS, 32)


def refit(dtype, mlp, model, progress, rounding=None):
    masks = np.random.default_rng(1).random((3, 4, 4)) < 0.6
    masks[:, :, 0] = True
    masks[0, :2] = True  # nothing is cut in the first layers of the first mask
    kept = [Kept(mask) for mask in masks]
    kept[2] = Kept(masks[2], np.random.default_rng(2).random((4, model.geometry.intermediate)) < 0.7)
    texts = texts_of(model)
    found = list(fit_repairs(model, kept, texts, dtype=dtype, mlp=mlp, rounding=rounding, progress=progress))
    return [
        weight.view(torch.int16).numpy() if dtype == torch.bfloat16 else weight.numpy()
        for repair in found
        for part in (repair.weights, repair.down)
        for _, weight in sorted(part.items())
    ]


STAGES = {
    "features": features,
    "continuations": continued,
    "fisher": partial(score, "fisher", "head"),
    "fisher-sampled": partial(score, "fisher-sampled", "group"),
    "kl": partial(score, "kl", "head"),
    "subspace": partial(score, "subspace", "head"),
}


@contextlib.contextmanager
def layer_calls(model, layer=0):
    """How often a layer was run."""
    count = [0]

    def hook(*_):
        count[0] += 1

    handle = model.layers[layer].register_forward_pre_hook(hook)
    try:
        yield count
    finally:
        handle.remove()


def interrupt_after(share, pieces):
    """A progress that interrupts at the end of the piece (a batch, a layer) with which `share` of them are done."""

    def progress(done, total):
        if done >= share * total and done % (total // pieces) == 0:
            raise KeyboardInterrupt

    return progress


def same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.tobytes() == other.tobytes()


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_stage_runs_the_batches_that_were_left_and_finds_the_same_bits(stage, share, model, tmp_path):
    run, batches, steps = STAGES[stage], len(text.encode(model, PROMPTS)), []
    assert batches > 4
    with layer_calls(model) as whole:
        expected = run(model, lambda *step: steps.append(step))
    assert steps == [(done, len(steps)) for done in range(1, len(steps) + 1)], "every step is told, one after the other"
    assert len(steps) % batches == 0
    with layer_calls(model) as before, pytest.raises(KeyboardInterrupt), keeping(Journal(tmp_path / "kept", every=0)):
        run(model, interrupt_after(share, batches))
    told = []
    with layer_calls(model) as after, keeping(Journal(tmp_path / "kept", every=0)):
        found = run(model, lambda *step: told.append(step))
    same(found, expected)
    assert before[0] > 0 and before[0] + after[0] == whole[0], "no pass is lost and none is repeated"
    assert told[-1] == (steps[-1] if share < 1 else (told[-1][1],) * 2)


@pytest.mark.parametrize("waits", [0, 3600], ids=["written", "waiting"])
def test_what_a_stage_had_measured_is_kept_whether_it_was_time_to_write_or_not(waits, model, tmp_path):
    """An interrupt that is heard writes what waits; then bytes are written once, however long the stage takes."""
    with pytest.raises(KeyboardInterrupt), keeping(Journal(tmp_path / "kept", every=waits)):
        features(model, interrupt_after(0.5, len(text.encode(model, PROMPTS))))
    rows = capture.features(model, PROMPTS)
    written = sum(path.stat().st_size for path in (tmp_path / "kept").iterdir() if path.is_file())
    assert 0.3 * rows.nbytes < written < 0.8 * rows.nbytes + 400 * len(list((tmp_path / "kept").iterdir()))
    with layer_calls(model) as left, keeping(Journal(tmp_path / "kept")):
        same([capture.features(model, PROMPTS)], [rows])
    assert 0 < left[0] < len(text.encode(model, PROMPTS))


def test_a_short_run_writes_nothing(model, tmp_path):
    with keeping(Journal(tmp_path / "kept")):
        features(model, lambda *_: None)
        refit(torch.float32, False, model, lambda *_: None)
    assert list(tmp_path.iterdir()) == []


def test_long_groups_of_batches_are_looked_at_together_and_give_the_same_bits(model, tmp_path):
    """With time to spare a criterion gets many batches at once, so that keeping costs next to nothing."""
    expected = STAGES["fisher"](model, lambda *_: None)
    with keeping(Journal(tmp_path / "kept", every=3600)):
        same(STAGES["fisher"](model, lambda *_: None), expected)


def test_a_score_of_sets_goes_on_at_the_domain_where_it_was(model, tmp_path):
    items = text.sentences(model.tokenizer, PROMPTS, 32)
    labels = np.arange(len(items)) % 3
    run = partial(measure, model, "fisher-rounds", items, labels=labels)
    with layer_calls(model) as whole:
        expected = run().values
    with layer_calls(model) as before, pytest.raises(KeyboardInterrupt), keeping(Journal(tmp_path / "kept", every=0)):
        run(progress=lambda done, total: _raise() if done > total / 3 else None)
    with layer_calls(model) as after, keeping(Journal(tmp_path / "kept", every=0)):
        same([run().values], [expected])
    assert after[0] == whole[0] * 2 // 3 and 0 < before[0] < whole[0]


def _raise():
    raise KeyboardInterrupt


FITS = {
    "fp32": (torch.float32, False),
    "bf16": (torch.bfloat16, False),
    "mlp": (torch.float32, True),
    "mlp in bf16": (torch.bfloat16, True),
    "rounded": (torch.float32, False, OnnxRounding(4)),
}


@pytest.mark.parametrize("share", [0.01, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("fit", FITS)
def test_an_interrupted_repair_goes_on_behind_its_layer_and_fits_the_same_bits(fit, share, model, tmp_path):
    dtype, mlp, *rounding = FITS[fit]
    run, layers = partial(refit, dtype, mlp, rounding=rounding[0] if rounding else None), len(model.layers)
    done = max(1, int(share * layers))
    expected = run(model, lambda *_: None)
    with contextlib.ExitStack() as stack:
        usual = [stack.enter_context(layer_calls(model, layer)) for layer in range(layers)]
        run(model, lambda *_: None)
    with pytest.raises(KeyboardInterrupt), keeping(Journal(tmp_path / "kept", every=0)):
        run(model, interrupt_after(share, layers))
    with keeping(Journal(tmp_path / "kept", every=0)), contextlib.ExitStack() as stack:
        calls = [stack.enter_context(layer_calls(model, layer)) for layer in range(layers)]
        found = run(model, lambda *_: None)
    same(found, expected)
    for layer in range(layers):
        # Each batch passes once, to learn how layers are called (and what rounded embeddings give them); those behind
        # the interrupt are fitted.
        learned = len(texts_of(model)) * (2 if rounding else 1)
        assert calls[layer] == (usual[layer] if layer >= done else [learned]), layer


def test_the_newest_states_are_kept_as_far_as_there_is_room(model, tmp_path, monkeypatch):
    kept = Journal(tmp_path, every=0)
    monkeypatch.setattr(journal, "STATES_BYTES", 10_000)
    for number in range(5):
        state = kept.state("repair", model, number)
        state.keep(lambda number=number: {"values": np.full(500, number, dtype=np.float64)})
        os.utime(max(tmp_path.glob("state-*"), key=lambda path: path.stat().st_mtime_ns), (1000 + number,) * 2)
    found = [kept.state("repair", model, number).read() for number in range(5)]
    assert [one is not None for one in found] == [False, False, False, True, True]
    assert found[4]["values"].tolist() == [4.0] * 500


def test_rows_that_depend_on_a_state_are_written_before_it_goes(model, tmp_path):
    kept = Journal(tmp_path, every=3600)
    kept.rows("distances", model, 1).keep(0, np.ones(3))
    kept.every = 0
    kept._due = 0.0
    kept.state("repair", model, 2).keep(lambda: {"values": np.zeros(2)})
    assert 0 in Journal(tmp_path).rows("distances", model, 1)


@pytest.mark.parametrize("change", [lambda ids: [*ids[:-1], ids[-1] + 1], lambda ids: ids[:-1], lambda ids: ids[::-1]])
def test_other_inputs_find_nothing(change, model, tmp_path):
    inputs = [1, 2, 3]
    kept = Journal(tmp_path, every=0)
    kept.rows("features", model, inputs).keep(0, np.ones(3))
    assert 0 in kept.rows("features", model, inputs)
    assert 0 not in kept.rows("features", model, change(inputs))
    assert 0 not in kept.rows("continuations", model, inputs)
    assert 0 not in kept.rows("features", tiny("qwen2", layers=4, seed=1, template="{{ messages }}"), inputs)


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "pickled"])
def test_a_damaged_file_is_refused(damage, model, tmp_path):
    kept = Journal(tmp_path, every=0)
    kept.rows("features", model, 1).keep(0, np.arange(300.0))
    (path,) = tmp_path.glob("*.safetensors")
    content = path.read_bytes()
    path.write_bytes(
        {
            "cut": content[:-8],
            "flipped": content[:-5] + bytes([content[-5] ^ 1]) + content[-4:],
            "emptied": b"",
            "pickled": b"\x80\x04N.",
        }[damage]
    )
    with pytest.raises(RunError, match=r"features-.* cannot be read.*Remove .*, and start again"):
        kept.rows("features", model, 1)


def test_one_run_at_a_time_has_a_journal_and_another_keeps_nothing(tmp_path):
    folder = tmp_path / ".unfinished-x"
    with claimed(folder) as first, claimed(folder) as second:
        assert first.keeps and not second.keeps
        assert not holds_work(folder)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("error", "stays"),
    [
        (KeyboardInterrupt(), True),
        (RunError("x"), True),
        (OSError(), True),
        (MemoryError(), True),
        (InputError("x"), False),
        (ParityError("x"), False),
    ],
    ids=repr,
)
@pytest.mark.parametrize("later", [False, True], ids=["meanwhile", "later"])  # while the model is cut and proven
def test_what_was_kept_stays_after_an_interrupt_and_goes_with_a_refusal(later, error, stays, model, tmp_path):
    folder = tmp_path / ".unfinished-x"
    with pytest.raises(type(error)), claimed(folder) as kept:
        with keeping(kept):
            kept.rows("features", model, 1).keep(0, np.ones(3))
            if not later:
                raise error
        raise error
    assert folder.exists() == stays == holds_work(folder)


def test_an_interrupt_before_anything_was_measured_leaves_no_folder(tmp_path):
    with pytest.raises(KeyboardInterrupt), claimed(tmp_path / ".unfinished-x"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_leftovers_go_after_two_weeks_unless_a_run_has_them(tmp_path):
    now, ages = time.time(), {"old": 15, "new": 13, "held": 15}
    for name, days in ages.items():
        folder = tmp_path / f".unfinished-{name}"
        folder.mkdir()
        (folder / "features-1.safetensors").write_bytes(b"")
        (folder / journal.LOCK).write_bytes(b"")
        for path in (*folder.iterdir(), folder):
            os.utime(path, (now - days * 86400,) * 2)
    (tmp_path / "unfinished-mine").mkdir()
    with journal._lock_of(tmp_path / ".unfinished-held"):
        os.utime(tmp_path / ".unfinished-held" / journal.LOCK, (now - 15 * 86400,) * 2)
        remove_old(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".unfinished-new", ".unfinished-held", "unfinished-mine"}
