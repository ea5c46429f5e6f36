"""Whether `bench` can be trusted: python -m benchmarks.bench [--trials 20].

On the embedded model, through the command line, on a machine that does nothing else:

* how long the demo's whole report takes (`build`, then `bench --quick`), from nothing;
* a model against a copy of itself, `--trials` times with `--quick`: every verdict other than "no measurable change" on
  time to first token and inter-token latency is a false alarm;
* the dense model against the sliced one, twice: whether the intervals of the two runs overlap, metric by metric.

Writes benchmarks/results/bench.json. Takes about a quarter of an hour.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from sspcompile.checkpoint import embedded_model

RESULTS = Path("benchmarks/results/bench.json")
PROGRAM = (sys.executable, "-m", "sspcompile.cli.main")
TIMED = ("prefill_seconds", "inter_token_seconds")
UNCHANGED = "no measurable change"


def command(home: Path, *args: str) -> str:
    return subprocess.run([*PROGRAM, *args, "-q"], cwd=home, check=True, capture_output=True, text=True).stdout


def demo(home: Path) -> dict[str, float]:
    """Seconds of the two commands, no toolkit there."""
    start = time.perf_counter()
    command(home, "build", "--scenario", "chemistry-helpdesk")
    built = time.perf_counter()
    command(home, "bench", "--quick")
    return {"build": built - start, "bench --quick": time.perf_counter() - built}


def against_itself(home: Path, trials: int) -> list[dict[str, Any]]:
    """Per trial the ratios of TIMED and of load and memory, with interval and verdict."""
    shutil.copytree(embedded_model(), home / "copy")
    found = []
    for number in range(trials):
        result = json.loads(command(home, "bench", "copy", "--model", "embedded", "--quick", "--fresh", "--json"))
        found.append(
            {
                r["metric"]: [r["improvement"], r["improvement_interval"], r["verdict"]]
                for r in result["ratios"]
                if r["interval"]
            }
        )
        click.echo(f"{number + 1} of {trials}: {alarms([found[-1]])}", err=True)
    return found


def alarms(trials: list[Mapping[str, Any]]) -> list[tuple[str, float]]:
    return [(name, trial[name][0]) for trial in trials for name in TIMED if trial[name][2] != UNCHANGED]


def twice(home: Path) -> Iterator[dict[str, Any]]:
    """The ratios of two runs of `bench` of the last build, metric by metric."""
    runs = [json.loads(command(home, "bench", "--fresh", "--json"))["ratios"] for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        if first["improvement_interval"] and second["improvement_interval"]:
            a, b = first["improvement_interval"], second["improvement_interval"]
            yield {
                "metric": first["metric"],
                "first": [first["improvement"], a["low"], a["high"]],
                "second": [second["improvement"], b["low"], b["high"]],
                "overlap": a["low"] <= b["high"] and b["low"] <= a["high"],
            }


@click.command()
@click.option("--trials", default=20, show_default=True, help="Of a model against itself.")
def main(trials: int) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        result: dict[str, Any] = {"demo_seconds": demo(home), "twice": list(twice(home))}
        result["against_itself"] = against_itself(home, trials)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    report(result)


def report(result: Mapping[str, Any]) -> None:
    seconds = result["demo_seconds"]
    click.echo(f"the demo's whole report: {sum(seconds.values()):.0f} s ({seconds})")
    for row in result["twice"]:
        one, two = (f"{v[0]:.3f} ({v[1]:.3f} to {v[2]:.3f})" for v in (row["first"], row["second"]))
        click.echo(f"{row['metric']}: {one}, again {two}: {'overlap' if row['overlap'] else 'DO NOT OVERLAP'}")
    trials = result["against_itself"]
    for name in TIMED:
        quiet = sum(trial[name][2] == UNCHANGED for trial in trials)
        click.echo(f"a model against itself, {name}: no measurable change in {quiet} of {len(trials)}")


if __name__ == "__main__":
    main()
