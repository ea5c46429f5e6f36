"""`recipe validate` says of a recipe what `build --dry-run` would refuse, all of it at once, each with its line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sspcompile.api.validate import validate
from sspcompile.request.recipe import shipped_recipes

HEAD = "schema_version: 1\nname: mine\ndescription: x\nscenario:\n  text: Answer questions about chemistry.\n"


def written(folder: Path, *lines: str, head: str = HEAD) -> Path:
    (folder / "mine.yaml").write_text(head + "".join(f"{line}\n" for line in lines), "utf-8")
    return folder / "mine.yaml"


def said(path: Path) -> list[str]:
    return [problem.said for problem in validate(path).problems]


# Lines of a recipe from the sixth on, and what is said of each.
REFUSED = {
    "units and heads": (
        ["units: layers", "keep: 0.5"],
        ["units (line 6): units layers removes whole layers, and keep"],
    ),
    "units and a score": (["units: layers", "criterion: obs"], ["units (line 6): units layers removes whole layers"]),
    "criterion": (["criterion: nosuch"], ["criterion (line 6): Unknown criterion 'nosuch'. Accepted: fisher, obs"]),
    "floor": (["protect: [nosuch=0.05]"], ["protect (line 6): --protect names no known domain: nosuch. Known:"]),
    "host": (["host: falcon"], ["host (line 6): no family is called 'falcon'; known: auto, llama, mistral"]),
    "pools": (["pools: /nonexistent"], ["pools (line 6): /nonexistent: it holds no *.yaml file"]),
    "axes": (["axes: 900"], ["axes (line 6): --axes 900 asks for more domains than there are pools"]),
    "two renderings": (["raw: true", "chat_template: x"], ["raw (line 6): raw and chat_template exclude each other"]),
    "prompts that are not there": (
        ["importance_from: prompts"],
        ["importance_from (line 6): prompts needs prompts, and the scenario has none"],
    ),
    "a pool of another model": (["model: embedded", "protect: [medicine=0.05]"], ["protect (line 7): --protect names"]),
    "rounding of several sizes": (
        ["quantize: int4", "nested: '1,0.5'"],
        ["quantize (line 6): quantize rounds one cut"],
    ),
    "many": (
        [
            "units: layers",
            "keep: 0.5",
            "criterion: nosuch",
            "host: falcon",
            "pools: /no",
            "raw: true",
            "chat_template: x",
        ],
        ["units (line 6)", "criterion (line 8)", "host (line 9)", "pools (line 10)", "raw (line 11)"],
    ),
    "many beside a wrong form": (
        ["size: 7", "criterion: nosuch", "sizes: 1", "units: attention", "layout: uniform"],
        ["size (line 6)", "sizes (line 8)", "criterion (line 7)", "units (line 9)"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_all_that_a_dry_run_refuses_is_said_at_once_with_its_line(case: str, tmp_path: Path, run) -> None:
    lines, expected = REFUSED[case]
    path = written(tmp_path, *lines)
    found = said(path)
    places = {match[0] for one in found if (match := re.match(r"[\w.]+ \(line \d+\)", one))}
    assert all(any(one.startswith(start) for one in found) for start in expected), found
    assert places == {re.match(r"[\w.]+ \(line \d+\)", start)[0] for start in expected}, found
    assert run("recipe", "validate", path)[0] == run("build", "-s", path, "--dry-run", "-q")[0] == 2


def test_files_and_domains_of_the_scenario_are_looked_for(tmp_path: Path) -> None:
    head = HEAD.replace("  text: Answer questions about chemistry.\n", "")
    lines = ["  prompts_file: p.jsonl", "  domains: {chemistry: 1, nosuch: 2}"]
    path = written(tmp_path, *lines, head=head)
    file, domain = sorted(said(path), reverse=True)
    assert domain.startswith("scenario.domains.nosuch (line 6): unknown domain 'nosuch'; known: chemistry")
    assert file.startswith("scenario.prompts_file (line 5): There is no file")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "answer": Infinity}')
    assert "p.jsonl, line 1 has an infinite number" in "".join(said(path))
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}')
    path = written(tmp_path, lines[0], head=head)
    assert said(path) == []


@pytest.mark.parametrize("lines", [["units: layers", "size: 0.5"], ["protect: [medicine=0.05]"], ["host: granite"], []])
def test_what_some_build_takes_is_valid(lines: list[str], tmp_path: Path) -> None:
    assert said(written(tmp_path, *lines)) == [], "a recipe without a model may be of any"


def test_recipes_that_ship_are_valid() -> None:
    assert [one for path in shipped_recipes() for one in said(path)] == []


def test_programs_have_the_rule_and_people_an_example(tmp_path: Path, run) -> None:
    path = written(tmp_path, "criterion: nosuch")
    code, out, _ = run("recipe", "validate", path, "--json")
    told = json.loads(out)
    assert code == 2 and not told["valid"] and told["files"] == {str(path): "mine"}
    assert [problem["rule"] for problem in told["problems"]] == ["setting"]
    assert "recipe show NAME" in run("recipe", "validate", path)[2]
