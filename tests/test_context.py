"""How long a text may be: every command keeps to a model's positions, and says so where they end a text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import family_config, save_random
from test_export_onnx import cut

from sspcompile.cli.main import main
from sspcompile.errors import ArtifactError, CheckpointError, InputError
from sspcompile.evaluate.answers import encode_references
from sspcompile.evaluate.asking import Limits, limits_for
from sspcompile.families import positions_of
from sspcompile.model.context import context_of, shortest_context
from sspcompile.model.loading import load_cut
from sspcompile.model.onnx_text import load_onnx

POSITIONS = 64


def random_model(folder: Path, positions: int) -> Path:
    config = family_config("llama", layers=2)
    config.max_position_embeddings = positions
    return save_random(folder, config, seed=3)


@pytest.fixture
def run(run, monkeypatch, tmp_path):
    monkeypatch.setenv("SSPCOMPILE_HOME", str(tmp_path))
    return run


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Whatever `run` takes, for texts of 64 tokens."""
    folder = tmp_path_factory.mktemp("models")
    dense, longer = random_model(folder / "dense", POSITIONS), random_model(folder / "longer", 4 * POSITIONS)
    found = {"model folder": dense, "per-layer cut": cut(dense, folder / "cut", "per-layer")}
    exports = {
        "export": (dense, ()),
        "export in int4": (dense, ("--precision", "int4")),
        "export in fp16": (dense, ("--precision", "fp16")),
        "export of last logits": (dense, ("--last-logits",)),
        "export with a shorter context": (longer, ("--context-length", POSITIONS)),
    }
    for name, (source, more) in exports.items():
        found[name] = folder / name
        args = ("export", "--format", "onnx", "--model", source, "--out", found[name], "-q", *more)
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in args])
        assert not stop.value.code
    return found


KINDS = (
    "model folder",
    "per-layer cut",
    "export",
    "export in int4",
    "export in fp16",
    "export of last logits",
    "export with a shorter context",
)
# The byte tokenizer makes one token of each letter. Texts of random models: none of these meets an end token.
PROMPT = "a prompt of forty tokens, no more no less"[:40]


@pytest.mark.parametrize("kind", KINDS)
def test_run_stops_where_the_positions_end_and_says_so_on_one_line(kind, models, run):
    code, out, err = run("run", models[kind], "-p", PROMPT, "--max-new-tokens", 100, "-q", "--json")
    (text,) = json.loads(out)["texts"]
    assert code == 0 and text["prompt_tokens"] == 40
    assert len(text["tokens"]) == 24 and text["full_context"] == POSITIONS
    assert err.startswith("Note: ") and f"ends at {POSITIONS} tokens" in err and err.count("\n") == 1
    code, out, err = run("run", models[kind], "-p", PROMPT, "--max-new-tokens", 100, "-q")
    assert code == 0 and out.endswith("\n") and "ends at 64 tokens" in err and err.count("\n") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_fits_exactly_is_written_without_a_word(kind, models, run):
    code, out, err = run("run", models[kind], "-p", PROMPT, "--max-new-tokens", 24, "-q", "--json")
    (text,) = json.loads(out)["texts"]
    assert (code, err, len(text["tokens"]), text["full_context"]) == (0, "", 24, None)


@pytest.mark.parametrize("length", [POSITIONS, 90])
@pytest.mark.parametrize("kind", KINDS)
def test_prompt_without_room_for_an_answer_is_refused_before_any_other_is_answered(kind, length, models, run):
    code, out, err = run("run", models[kind], "-p", "short", "-p", "x" * length, "-q")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"has {length} tokens" in err and "at most 63 tokens" in err
    code, out, err = run("run", models[kind], "-p", "x" * (POSITIONS - 1), "-q", "--json")
    assert code == 0 and len(json.loads(out)["texts"][0]["tokens"]) == 1


def test_export_refuses_what_lies_beyond_its_tables_without_a_line_of_the_runtimes_own(models, capfd):
    model = load_onnx(models["export"])
    assert model.positions == POSITIONS
    ids = torch.full((2, 40), 7)
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    assert [len(tail) for tail in model.continuations(ids, mask, 24)] == [24, 24]
    with pytest.raises(InputError, match="exceed the 64"):
        model.continuations(ids, mask, 25)
    with pytest.raises(InputError, match="at most 64 tokens"):
        model.session.logits(np.full((1, 65), 7))
    assert model.session.logits(np.full((1, 64), 7)).shape[1] == 64
    _, cache = model.session.prefill(np.full((1, 64), 7), capacity=80)
    with pytest.raises(InputError, match="at most 64 tokens"):
        model.session.step(np.array([7]), cache)
    assert capfd.readouterr().err == ""


def test_padded_batch_at_the_limit_writes_what_each_row_writes_alone(models):
    for kind in ("model folder", "export"):
        model = load_cut(models[kind]) if kind == "model folder" else load_onnx(models[kind])
        rows = [torch.arange(length) + 5 for length in (48, 11, 30)]
        ids = torch.stack([torch.cat([torch.zeros(48 - len(row), dtype=torch.int64), row]) for row in rows])
        mask = torch.stack([(torch.arange(48) >= 48 - len(row)).long() for row in rows])
        alone = [model.continuations(row[None], torch.ones_like(row[None]), 16)[0] for row in rows]
        assert model.continuations(ids, mask, 16) == alone


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({}, None),
        ({"max_position_embeddings": None}, None),
        ({"max_position_embeddings": 0}, None),
        ({"max_position_embeddings": "512"}, None),
        ({"max_position_embeddings": True}, None),
        ({"max_position_embeddings": 512, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 512),
        ({"max_position_embeddings": 512, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, 1024),
        ({"max_position_embeddings": 512, "rope_scaling": {"type": "dynamic", "factor": 2}}, 1024),
        ({"max_position_embeddings": 512, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 512),
        (
            {
                "max_position_embeddings": 512,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
            },
            2048,
        ),
        (
            {
                "max_position_embeddings": 2048,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
            },
            2048,
        ),
        ({"max_position_embeddings": 512, "rope_parameters": {"full_attention": {"rope_type": "default"}}}, 512),
        ({"max_position_embeddings": 512, "rope_scaling": "broken"}, 512),
    ],
)
def test_positions_are_those_that_the_configuration_is_made_for(config, positions, tmp_path):
    assert positions_of(config) == positions
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert context_of(tmp_path) == positions


def test_shortest_context_leaves_out_whoever_does_not_say(models, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert shortest_context([tmp_path]) is None
    assert shortest_context([tmp_path, models["export"]]) == POSITIONS
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        context_of(tmp_path)


@pytest.mark.parametrize(
    "broken",
    ['{"model": {"decoder": {}, "context_length": "64"}}', '{"model": {"decoder": 3}}', "[]", "{", '{"model": null}'],
)
def test_damaged_settings_of_an_export_are_refused(broken, models, tmp_path, run):
    for file in models["export"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "genai_config.json").write_text(broken)
    with pytest.raises(ArtifactError, match="damaged"):
        context_of(tmp_path)
    code, out, err = run("run", tmp_path, "-p", "x", "-q")
    assert (code, out, err.count("\n")) == (2, "", 1) and "damaged" in err


def test_limits_of_eval_fit_the_positions():
    assert limits_for(None) == Limits(512, 32, 32, None)
    assert limits_for(2048) == Limits(512, 32, 32, 2048)
    assert limits_for(512) == Limits(480, 32, 32, 512)
    assert limits_for(48) == Limits(24, 24, 32, 48)
    assert limits_for(48, max_tokens=8, new_tokens=40, batch_size=2) == Limits(8, 40, 2, 48)
    assert limits_for(48, max_tokens=20, new_tokens=40) == Limits(8, 40, 32, 48)
    assert Limits(512, 40, 32).within(48) == Limits(8, 40, 32, 48)
    with pytest.raises(InputError, match="at most --max-new-tokens 47"):
        limits_for(48, new_tokens=48)


def test_answer_that_is_scored_shortens_its_prompt_and_is_never_cut(models):
    model = load_cut(models["model folder"])
    (whole,) = encode_references(model, ["x" * 60], ["y" * 10])
    (fitted,) = encode_references(model, ["x" * 60], ["y" * 10], positions=POSITIONS)
    reply = whole.ids[whole.prompt :]
    assert len(whole.ids) > POSITIONS == len(fitted.ids) and fitted.ids[fitted.prompt :] == reply
    with pytest.raises(InputError, match="An answer has"):
        encode_references(model, ["x"], ["y" * POSITIONS], positions=POSITIONS)
