"""The table of runtimes in docs/runtimes.md: what the runs wrote down, and nothing else."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

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


def test_no_cut_failed_and_every_other_cell_says_why():
    for one in PAGE["results"]():
        assert one["versions"] and one["cells"]
        for cell in one["cells"]:
            assert cell["result"] == "same text" or cell["reason"], cell
            assert cell["result"] != "failed" or cell["layout"] == "dense", cell


def test_a_failure_and_a_cell_that_was_not_run_are_told_apart_from_the_same_text():
    cells = [{"runtime": "r", "family": "f", "layout": name, "result": "same text"} for name in PAGE["LAYOUTS"]]
    cells[1] |= {"result": "failed", "reason": "bad"}
    cells[2] |= {"result": "not run", "reason": "no graph"}
    found = [{"environment": "main", "date": "2000-01-01", "versions": {"r": "1"}, "cells": cells}]
    text = PAGE["table"](found)
    assert "| f | 3 of 5 (note 1, 2) |" in text and "1. failed: bad (uniform heads)." in text
    assert "2. not run: no graph (uniform heads and channels)." in text and "Not run yet: " in text


def test_a_page_without_the_place_is_not_written():
    with pytest.raises(ValueError, match="lacks"):
        PAGE["page"]("# Runtimes\n", [])


@pytest.mark.parametrize(("tokens", "expected"), [([1, 9, 2], [1]), ([1, 2], [1, 2]), ([9], [])])
def test_what_follows_an_end_token_is_not_compared_nor_the_token_itself(tokens, expected):
    assert CHECK["until_end"](tokens, 9) == expected
