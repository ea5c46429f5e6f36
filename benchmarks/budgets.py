"""Whole builds of a real model for one scenario, by budget, unit and layout: what is lost, and how fast the cut is.

    python -m benchmarks.budgets --model SMOLLM2 --questions train.jsonl --judge test.jsonl
                                 [--cases size-0.9,layers-0.9] [--speed size-0.7]

The scenario is PROMPTS word problems with reference answers, as in `benchmarks.build`; JUDGED problems that no build
has seen tell the KL from the dense model, the tokens that change hands and the perplexity of the answers. A case is a
set of options of `sspcompile build` (CASES). The first build learns the model, later ones find it learned. `--speed`
names cases that `sspcompile bench` measures against the dense model afterwards. With `--folder` a second run goes on
where the first one ended.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import click
import torch

from benchmarks.build import JUDGED, PROMPTS, build, lost, problems, told, write_prompts
from benchmarks.rows import Results, Row
from sspcompile.workspace import MODEL, PLAN

ASKED = "prompts.jsonl"
CASES: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "keep-0.75": ("--keep", "0.75", "--layout", "per-layer"),
    **{
        f"{name}-{size}": ("--size", size, *options)
        for size in ("0.9", "0.8", "0.7")
        for name, options in (
            ("size", ("--layout", "per-layer")),
            ("uniform", ("--layout", "uniform")),
            ("layers", ("--units", "layers")),
        )
    },
    "attention-0.95": ("--size", "0.95", "--units", "attention"),
    "size-0.95": ("--size", "0.95", "--layout", "per-layer"),
    "protect-0.9": ("--size", "0.9", "--layout", "per-layer", "--protect", "general=0.2"),
}


def built(model: str, name: str, home: Path, unseen: Sequence[tuple[str, str]]) -> Row:
    """What a build of a case costs, and what is lost on problems that it has not seen."""
    shutil.rmtree(home / name, ignore_errors=True)  # of a run that ended before its row was written
    cost = build(model, ASKED, name, home, CASES[name])
    counted = json.loads((home / name / PLAN).read_text("utf-8"))["parameters"]
    figures = lost(model, home / name / MODEL, unseen).figures()
    share = counted["sliced"] / counted["dense"]
    return {"options": " ".join(CASES[name]), "parameters": share, **asdict(cost), **figures}


def told_build(name: str) -> Callable[[Row], str]:
    return lambda row: (
        f"{name}: {row['parameters']:.1%} of the parameters, {row['wall'] / 60:.1f} min, {row['peak'] / 1e9:.2f} GB; "
        f"KL {row['kl']:.3f}, {row['same_token']:.1%} same token, perplexity {row['perplexity_ratio']:.3f} times dense"
    )


def told_speed(name: str) -> Callable[[Row], str]:
    def line(row: Row) -> str:
        timed = [one for one in row["ratios"] if one["load"] is not None]
        shown = (f"{one['metric']} {one['improvement']:.2f} ({one['verdict']})" for one in timed)
        return f"{name}, dense over cut: {', '.join(shown)}"

    return line


@click.command()
@click.option("--model", required=True, help="A model folder or a hub name.")
@click.option("--questions", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--judge", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--prompts", default=PROMPTS, show_default=True)
@click.option("--cases", default=",".join(CASES), show_default=True)
@click.option("--speed", "timed", default="", help="Cases whose speed is measured.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to build; a temporary folder by default.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/budgets.json"))
def main(
    model: str, questions: Path, judge: Path, prompts: int, cases: str, timed: str, folder: Path | None, out: Path
) -> None:
    """Build one scenario to many budgets."""
    model = str(Path(model).resolve()) if Path(model).is_dir() else model
    settings: Row = {"model": Path(model).name, "prompts": prompts, "threads": torch.get_num_threads()}
    results = Results(out, settings, goes_on=folder is not None)
    with tempfile.TemporaryDirectory() as temporary:
        home = (folder or Path(temporary)).resolve()
        home.mkdir(parents=True, exist_ok=True)
        write_prompts(home / ASKED, problems(questions, 0, prompts))
        unseen = problems(judge, 0, JUDGED)
        for name in cases.split(","):
            results.row(name, partial(built, model, name, home, unseen), told_build(name))
        for name in filter(None, timed.split(",")):
            measure = partial(told, ["bench", str(home / name), "--quiet"], home)
            results.row(f"{name}, speed", measure, told_speed(name))


if __name__ == "__main__":
    main()
