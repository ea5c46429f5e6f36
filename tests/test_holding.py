"""A build that nothing could guard or judge is refused, in one line, before any work where that can be known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from builders import Shape, make_checkpoint
from refusals import refused

from sspcompile.errors import InputError
from sspcompile.model.dense import DenseModel
from sspcompile.request.domains import DomainPool
from sspcompile.request.splits import FEWEST, draw_splits

COMMANDS = (("build", "--keep", "0.75"), ("build", "--nested", "1,0.9"), ("plan", "--keep", "0.75"), ("trim",))


def pool_file(name: str, count: int) -> dict[str, object]:
    prompts = [f"What does {name} say about {n}?" for n in range(count)]
    return {"schema_version": 1, "name": name, "description": "x", "descriptions": ["y"], "prompts": prompts}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_checkpoint(tmp_path / "model", Shape(layers=2, hidden=32, kv_heads=2, group_size=2, head_dim=8))
    (tmp_path / "mine").mkdir()
    for name, count in (("small", 6), ("large", 16)):
        (tmp_path / "mine" / f"{name}.yaml").write_text(json.dumps(pool_file(name, count)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(home: Path, prompts: int, **domains: float) -> Path:
    scenario: dict[str, object] = {"domains": domains}
    if prompts:
        scenario["prompts"] = [f"My question {n}" for n in range(prompts)]
    told = {"schema_version": 1, "name": "desk", "description": "x", "scenario": scenario, "model": "model"}
    (home / "desk.yaml").write_text(json.dumps(told | {"pools": "mine"}))
    return home / "desk.yaml"


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize(
    ("prompts", "domains"), [(0, {"small": 1.0}), (0, {"small": 0.5, "large": 0.5}), (7, {"small": 1.0})]
)
def test_a_stated_domain_whose_pool_holds_none_out_is_refused_before_any_work(
    run, home, monkeypatch, command, prompts, domains
):
    monkeypatch.setattr(DenseModel, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    given = (command[0], "--scenario", str(recipe(home, prompts, **domains)), *command[1:])
    done = run(*given, *(() if command[0] == "plan" else ("--out", "cut")))
    refused(done, "pool small has 6 prompts", "8 are needed", "Add 2 or more to mine/small.yaml", "give desk 8")
    assert not (home / "cut").exists()


def test_pools_that_hold_some_out_and_enough_prompts_of_ones_own_are_taken(run, home):
    for prompts, domains in ((8, {"small": 1.0}), (0, {"large": 1.0})):
        code, _, err = run("build", "--scenario", str(recipe(home, prompts, **domains)), "--keep", "0.75", "--dry-run")
        assert code == 0, err


@pytest.mark.parametrize("count", range(1, 18))
@pytest.mark.parametrize("asked", ["nothing", "what is held out"])
def test_every_split_has_texts_that_guard_and_judge_or_is_refused(count, asked):
    pool = DomainPool("mine", "x", (), tuple(f"mine {n}" for n in range(count)))
    prompts = () if asked == "nothing" else pool.prompts[3::4]
    try:
        found = draw_splits(prompts, np.ones(1), (pool,), 0)
    except InputError as error:
        assert f"mine with {count} prompts" in str(error) and (count < FEWEST or prompts)
    else:
        assert found.guard and found.judge and count >= FEWEST
