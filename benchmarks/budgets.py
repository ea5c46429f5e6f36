"""Whole builds of a real model for one scenario, by budget, unit and layout: what is lost, and how fast the cut is.

    python -m benchmarks.budgets --model SMOLLM2 --questions train.jsonl --judge test.jsonl
                                 [--cases size-0.9,layers-0.9] [--speed size-0.7]

The scenario is PROMPTS word problems with reference answers, as in `benchmarks.build`; JUDGED problems that no build
has seen tell the KL from the dense model, the tokens that change hands and the perplexity of the answers. A case is a
set of options of `sspcompile build` (CASES). The first build learns the model, later ones find it learned. `--speed`
names cases that `sspcompile bench` measures against the dense model afterwards. Rows that OUT holds already are not
measured again.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import click
import torch

from benchmarks.build import JUDGED, PROMPTS, lost, problems, run, write_prompts

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
    "protect-0.9": ("--size", "0.9", "--layout", "per-layer", "--protect", "general=0.2"),
}


def parameters(folder: Path) -> float:
    """Share of the dense model's parameters that an artifact has."""
    told = json.loads((folder / "plan.json").read_text("utf-8"))["parameters"]
    return float(told["sliced"] / told["dense"])


def speed(folder: Path) -> dict[str, object]:
    """What `sspcompile bench` prints of an artifact."""
    command = [sys.executable, "-m", "sspcompile.cli.main", "bench", str(folder), "--json"]
    told: dict[str, object] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return told


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
    head = {"model": Path(model).name, "prompts": prompts, "judged": JUDGED, "threads": torch.get_num_threads()}
    rows: dict[str, object] = json.loads(out.read_text("utf-8")) if out.exists() else head
    with tempfile.TemporaryDirectory() as temporary:
        home = folder or Path(temporary)
        home.mkdir(parents=True, exist_ok=True)
        write_prompts(home / "prompts.jsonl", problems(questions, 0, prompts))
        for name in cases.split(","):
            place = home / name
            if name in rows and (name not in timed.split(",") or place.is_dir()):
                continue
            words = ["--scenario", "prompts.jsonl", "--model", model, "--out", name, "--quiet", "--overwrite"]
            cost = run([sys.executable, "-m", "sspcompile.cli.main", "build", *words, *CASES[name]], home)
            figures = lost(model, place / "model", problems(judge, 0, JUDGED))
            rows[name] = {"options": " ".join(CASES[name]), "parameters": parameters(place), **asdict(cost), **figures}
            click.echo(
                f"{name}: {parameters(place):.1%} of the parameters, {cost.wall / 60:.1f} min, "
                f"{cost.peak / 1e9:.2f} GB; KL {figures['kl']:.3f}, {figures['same_token']:.1%} same token, "
                f"perplexity {figures['perplexity_ratio']:.3f} times dense"
            )
            _keep(rows, out)
        for name in filter(None, timed.split(",")):
            rows[f"{name}, speed"] = speed(home / name)
            _keep(rows, out)


def _keep(rows: Mapping[str, object], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
