"""Which head score measures best on the embedded model, at equal budgets, with and without repair.

    python benchmarks/criteria.py [--items 40] [--keep 0.5 --keep 0.25] [--out benchmarks/results/criteria.json]

For each of the six domains a mask is compiled from the toolkit (which never saw a held-out text), repaired on pool
prompts, and the masked model answers held-out items. A cell is the mean over domains of the exact match, and of the
divergence from the dense model on held-out pool prompts. Per-layer layout; `random` keeps the first layer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sspcompile.compile.budget import merit
from sspcompile.compile.layouts import choose
from sspcompile.compile.mixture import given_mixture, head_scores
from sspcompile.criteria.chance import first_layer_kept
from sspcompile.domains import load_pools
from sspcompile.embedded.corpus import DOMAINS, items
from sspcompile.embedded.evaluate import score
from sspcompile.loaded import LoadedModel, head_gates
from sspcompile.pipeline.compiling import open_subject, toolkit_for
from sspcompile.pipeline.evidence import gather
from sspcompile.pipeline.judging import Judge
from sspcompile.prepare.toolkit import Toolkit
from sspcompile.recipe import resolve
from sspcompile.scenario import as_recipe, read_scenario
from sspcompile.slicing.repair import Repair, repaired
from sspcompile.workspace import Workspace

CRITERIA = ("fisher", "kl", "subspace", "subspace-probe")
KEEPS = (0.5, 0.25)
EVALUATION_SEED = 40
RANDOM_SEEDS = 2


@dataclass(frozen=True)
class Cell:
    """One domain, one score, one budget."""

    domain: str
    criterion: str
    keep: float
    repaired: bool
    exact_match: float
    mean_kl: float


def exact_match(loaded: LoadedModel, kept: np.ndarray, repair: Repair | None, domain: str, count: int) -> float:
    """Of the masked model on held-out items of a domain."""
    with head_gates(loaded, torch.from_numpy(kept).float()), repaired(loaded, repair):
        return score(loaded.model, loaded.tokenizer, items(domain, "heldout", EVALUATION_SEED, count)).mean


def merits(toolkit: Toolkit, domain: str, shape: tuple[int, int]) -> Mapping[str, np.ndarray]:
    """Every score that is compared, as merit [layers, heads]."""
    mixture = given_mixture(toolkit, {domain: 1.0}, source="benchmark")
    found = {name: merit(head_scores(toolkit, name, mixture), toolkit.whitelist) for name in CRITERIA}
    found["fisher, domain-free"] = merit(toolkit.importance["fisher"].astype(float).mean(-1), toolkit.whitelist)
    found["fisher, no whitelist"] = head_scores(toolkit, "fisher", mixture)
    return found | {f"random {seed}": first_layer_kept(shape, seed) for seed in range(RANDOM_SEEDS)}


@click.command()
@click.option("--items", "count", default=40, show_default=True, help="Held-out items per domain.")
@click.option("--keep", "keeps", multiple=True, type=float, default=KEEPS, show_default=True, help="Keep ratios.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/criteria.json"))
def main(count: int, keeps: tuple[float, ...], out: Path) -> None:
    """Measure every cell and print the means over domains."""
    read, _ = read_scenario("no scenario")
    options = resolve(as_recipe(read), command_line={}, environment=os.environ)
    subject = open_subject(None)
    loaded = subject.load()
    toolkit, _ = toolkit_for(subject, loaded, options, Workspace(Path()), lambda *_: None, CRITERIA)
    g = subject.checkpoint.geometry
    full = np.ones((g.layers, g.heads), dtype=bool)
    cells = []
    for domain in track(DOMAINS, "domains"):
        cells.append(Cell(domain, "dense", 1.0, False, exact_match(loaded, full, None, domain, count), 0.0))
        evidence = gather((), given_mixture(toolkit, {domain: 1.0}, source="benchmark"), load_pools(), 0)
        judge = Judge(
            loaded, evidence, max_tokens=512, new_tokens=16, seed=0, repair="least-squares", dtype=torch.float32,
            progress=lambda *_: None,
        )  # fmt: skip
        for name, values in merits(toolkit, domain, full.shape).items():
            for keep in keeps:
                candidate = judge.candidate("per-layer", choose(values, g.kv_heads, keep, "per-layer"))
                for repair, figures in ((None, candidate.plain), (candidate.repair, candidate.mended)):
                    found = exact_match(loaded, candidate.choice.kept, repair, domain, count)
                    label = "random, first layer kept" if name.startswith("random") else name
                    cells.append(Cell(domain, label, keep, repair is not None, found, figures.judge.mean_kl))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps([asdict(cell) for cell in cells], indent=0) + "\n", "utf-8")
    show(cells, keeps)


def show(cells: list[Cell], keeps: tuple[float, ...]) -> None:
    """Exact match (mean KL in nats) per criterion and budget."""
    console = Console(width=120)
    dense = np.mean([cell.exact_match for cell in cells if cell.criterion == "dense"])
    console.print(f"dense: exact match {dense:.3f}")
    for mended in (False, True):
        table = Table("score", *(f"keep {keep:g}" for keep in keeps), title="repaired" if mended else "not repaired")
        for name in dict.fromkeys(cell.criterion for cell in cells if cell.criterion != "dense"):
            row = []
            for keep in keeps:
                chosen = [c for c in cells if (c.criterion, c.keep, c.repaired) == (name, keep, mended)]
                match, kl = np.mean([c.exact_match for c in chosen]), np.mean([c.mean_kl for c in chosen])
                row.append(f"{match:.3f} ({kl:.3f})")
            table.add_row(name, *row)
        console.print(table)


if __name__ == "__main__":
    main()
