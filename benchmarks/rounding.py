"""Cutting against rounding on a real model: what is lost, for how many bytes, in ONNX Runtime or as GGUF.

    python -m benchmarks.rounding --model SMOLLM2 --data DIR [--scenarios word-problems] [--sizes 1,0.8]

Scenarios, texts and scores are those of `benchmarks.real`: a per-layer cut of heads and channels by `obs` on FIT texts,
repaired on REPAIRED of them, judged on JUDGED others, which `evaluate.rounding` reads as `build --quantize` does. A
size of 1 removes nothing. Rows come by twos: the cut refitted for the rounding, as a build does it, and the cut that
knows of none.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

import click

from benchmarks.real import REPAIRED, Budget, Ground, scored
from sspcompile.api.rounding import rounding_of
from sspcompile.export.refitted import write_refitted
from sspcompile.model.blocks import ROUNDINGS
from sspcompile.model.dense import DenseModel, open_dense
from sspcompile.model.placement import Placement
from sspcompile.model.text import batches_of
from sspcompile.repair.fitting import fit_repairs
from sspcompile.repair.repair import Repair, refitted_dtype
from sspcompile.report.model import RoundingSection
from sspcompile.report.rounding import named, rounding_verdict
from sspcompile.request.rounding import Rounded
from sspcompile.request.splits import thinned
from sspcompile.slicing.layouts import Choice
from sspcompile.slicing.mask import HeadMask, kept_of
from sspcompile.slicing.plan import SlicePlan, make_plan
from sspcompile.slicing.sizes import Worth
from sspcompile.slicing.write import write_model


@dataclass(frozen=True)
class Asked:
    """A share of all parameters, a precision, and threads (all by default)."""

    size: float
    precision: Rounded
    threads: int | None


def cut(dense: DenseModel, choice: Choice, repair: Repair | None, folder: Path) -> SlicePlan:
    """Write the model folder; gives its plan."""
    g = dense.checkpoint.geometry
    mask = HeadMask(
        model=dense.fingerprint,
        layers=g.layers,
        heads=g.heads,
        kv_heads=g.kv_heads,
        kept=kept_of(choice.kept),
        layout="per-layer",
        keep_requested=choice.ratio,
        keep_achieved=choice.ratio,
        scores=tuple((0.0,) * g.heads for _ in range(g.layers)),
        whitelist=(),
        criterion="obs",
        scenario={},
        intermediate=g.intermediate,
        channels=choice.kept_channels,
    )
    plan = make_plan(dense.checkpoint, mask)
    write_model(dense.checkpoint, plan, folder, replaced=repair.replaced(choice.units, g) if repair is not None else {})
    return plan


def weighed(ground: Ground, name: str, dense: DenseModel, worth: Worth, asked: Asked) -> Iterator[RoundingSection]:
    """A cut of a size, refitted for its rounding and not."""
    batches = batches_of(ground.loaded, thinned(ground.fit(name), REPAIRED))
    g, dtype = dense.checkpoint.geometry, refitted_dtype(dense.checkpoint)
    choice = Budget("least-squares", "per-layer", None, asked.size).choice(worth, g)
    mask, rounding = [choice.units], ROUNDINGS[asked.precision]
    repair = None if choice.units.everything else next(fit_repairs(ground.loaded, mask, batches, dtype=dtype))
    knowing = next(fit_repairs(ground.loaded, mask, batches, dtype=dtype, rounding=rounding))
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        plan = cut(dense, choice, repair, home / "cut")
        write_refitted(home, asked.precision, plan, knowing.replaced(choice.units, g))
        for refitted in (home, None):
            yield rounding_of(
                dense,
                home / "cut",
                ground.judged(name)[0].texts,
                asked.precision,
                home,
                refitted=refitted,
                custom_code=plan.custom_code,
                seed=0,
                placement=Placement(threads=asked.threads),
            )


def told(section: RoundingSection) -> None:
    click.echo("Refitted for its rounding:" if section.refitted else "Not refitted for its rounding:")
    for row in section.rows:
        click.echo(f"{named(row):32} {row.weight_bytes / 1e6:8.1f} MB  KL {row.mean_kl.value:.4f}")
    click.echo(rounding_verdict(section))


@click.command()
@click.option("--model", required=True, help="A model folder or a hub name.")
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--scenarios", default="word-problems", show_default=True)
@click.option("--sizes", default="1,0.8", show_default=True)
@click.option("--precision", type=click.Choice(get_args(Rounded)), default="int4", show_default=True)
@click.option("--threads", type=int, help="All by default.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/rounding.jsonl"))
def main(model: str, data: Path, scenarios: str, sizes: str, precision: str, threads: int | None, out: Path) -> None:
    """Weigh cuts against roundings."""
    dense = open_dense(model)
    ground = Ground(dense.load(), data, 0)
    for name in scenarios.split(","):
        _, worth, _ = next(iter(scored(ground, name, 0, ())))
        for size in map(float, sizes.split(",")):
            for section in weighed(ground, name, dense, worth, Asked(size, cast(Rounded, precision), threads)):
                told(section)
                row = {"model": Path(dense.name).name, "scenario": name, "size": size}
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row | section.model_dump(mode="json")) + "\n")


if __name__ == "__main__":
    main()
