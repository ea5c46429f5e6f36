"""The table of docs/runtimes.md from benchmarks/results/runtimes: `python tests/runtimes/page.py`, from the top."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "runtimes", ROOT / "docs" / "runtimes.md"
START, END = "<!-- runtimes: written by tests/runtimes/page.py -->", "<!-- /runtimes -->"
# As check.py has them. Those without a file were not run.
ENVIRONMENTS = ("main", "compat", "oldest", "newest", "optimum", "gguf", "vllm")
PLANNED = {
    "oldest": "transformers, the oldest allowed",
    "newest": "transformers, the newest",
    "compat": "transformers 4.57",
    "optimum": "optimum-onnx",
    "gguf": "llama.cpp",
    "vllm": "vLLM",
}
LAYOUTS = (
    "dense",
    "uniform heads",
    "uniform heads and channels",
    "per-layer heads",
    "per-layer heads and channels",
    "fewer layers",
    "a layer without attention",
)


def results() -> list[dict[str, Any]]:
    """What every environment found, those that were run."""
    files = (RESULTS / f"{name}.json" for name in ENVIRONMENTS)
    return [json.loads(file.read_text("utf-8")) for file in files if file.is_file()]


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """One column per runtime, one row per family; what is not the same text has a note."""
    columns = [(one, runtime) for one in found for runtime in one["versions"]]
    families = list(dict.fromkeys(cell["family"] for one in found for cell in one["cells"]))
    notes: dict[str, int] = {}
    lines = [
        "| family | " + " | ".join(f"{runtime} {one['versions'][runtime]}" for one, runtime in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for family in families:
        cells = [_cell(one["cells"], runtime, family, notes) for one, runtime in columns]
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    ran = {one["environment"] for one in found}
    absent = [PLANNED[name] for name in ENVIRONMENTS if name not in ran]
    absent += [f"{missing} in {', '.join(one['versions'])}" for one in found if (missing := _missing(one["cells"]))]
    told = [
        "Each cell was run: the model loads, and its greedy text is that of transformers. "
        f"“{len(LAYOUTS)} of {len(LAYOUTS)}” are {_words()}; tiny random models of four layers ({_dates(found)}; "
        "`make test-runtimes`). The dense ones are as transformers 5 saved them."
        + (" vLLM is started as `plan` says." if "vllm" in ran else "")
    ]
    told += [f"Not run yet: {'; '.join(absent)}."] if absent else []
    told += [f"{number}. {reason}" for reason, number in notes.items()]
    return "\n".join([*told[: 1 + bool(absent)], "", *lines, "", *told[1 + bool(absent) :]]).rstrip() + "\n"


def _dates(found: Sequence[Mapping[str, Any]]) -> str:
    """When; and which runtimes then, where they were not all run on one day."""
    days: dict[str, list[str]] = {}
    for one in found:
        days.setdefault(one["date"], []).extend(f"{name} {version}" for name, version in one["versions"].items())
    if len(days) == 1:
        return f"on {next(iter(days))}"
    return "; ".join(f"{', '.join(names)} on {day}" for day, names in sorted(days.items()))


def _words() -> str:
    return ", ".join(LAYOUTS[:-1]) + f", and {LAYOUTS[-1]}"


def _missing(cells: Sequence[Mapping[str, str]]) -> str:
    """The layouts that an earlier run did not have."""
    return ", ".join(name for name in LAYOUTS if name not in {cell["layout"] for cell in cells})


def _cell(cells: Sequence[Mapping[str, str]], runtime: str, family: str, notes: dict[str, int]) -> str:
    """`5 of 5`, or how many, and why the others are not the same."""
    own = {cell["layout"]: cell for cell in cells if (cell["runtime"], cell["family"]) == (runtime, family)}
    same = [name for name in LAYOUTS if name in own and own[name]["result"] == "same text"]
    others: dict[str, list[str]] = {}
    for name in LAYOUTS:
        if name in own and name not in same:
            others.setdefault(f"{own[name]['result']}: {own[name]['reason']}", []).append(name)
    marks = []
    for reason, names in others.items():
        where = "" if len(names) == len(own) else f" ({', '.join(names)})"
        note = f"{reason}{where}."
        marks.append(str(notes.setdefault(note, len(notes) + 1)))
    return f"{len(same)} of {len(own)}" + (f" (note {', '.join(marks)})" if marks else "")


def page(text: str, found: Sequence[Mapping[str, Any]]) -> str:
    """The page with the table in its place. Raises ValueError for one without the place."""
    before, marker, rest = text.partition(START)
    _, closing, after = rest.partition(END)
    if not marker or not closing:
        raise ValueError(f"{PAGE} lacks {START} ... {END}")
    return f"{before}{START}\n{table(found)}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8"), results()), "utf-8")
