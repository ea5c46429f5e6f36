"""How firmly a repair holds weights, and how much more late layers cost than early ones: what both are worth.

    python -m benchmarks.repairs --model SMOLLM2 --data DIR [--scenarios word-problems,...] [--fit 64] [--texts 32,64]
                                 [--ridges 0.3/1,0.1/0.1] [--tilts 0,1] [--sizes 0.9,0.8] [--keeps 0.75]
                                 [--repairs least-squares,least-squares-mlp]

Scenarios and texts are those of `benchmarks.real`. Units are ranked on FIT texts of a scenario, masks are per layer,
repaired on TEXTS of those and judged on others. A pair of ridges is that of o_proj / down_proj. Repairs are those of
`build --repair`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import click

from benchmarks.real import FIT, SCENARIOS, Budget, Ground, figures
from sspcompile.model.dense import open_dense
from sspcompile.model.text import batches_of
from sspcompile.progress import no_steps
from sspcompile.repair.fitting import RIDGES, Ridges, fit_repairs
from sspcompile.repair.repair import refitted_dtype
from sspcompile.request.splits import thinned
from sspcompile.select.reading import RATE
from sspcompile.select.scoring import TILT, measured, tilted
from sspcompile.slicing.sizes import Worth, share_of


def rows(
    ground: Ground,
    name: str,
    budgets: list[Budget],
    texts: list[int],
    ridges: list[Ridges],
    tilts: list[float],
    repairs: list[str],
) -> Iterator[dict[str, object]]:
    """A row for every mask and repair."""
    loaded, (own, off) = ground.loaded, ground.judged(name)
    g, dtype = loaded.geometry, refitted_dtype(open_dense(str(loaded.path)).checkpoint)
    found = measured(loaded, ground.fit(name), 0, "head", no_steps, repair="none")
    for budget, tilt in product(budgets, tilts):
        late = tilted(g.layers, tilt)
        channels = None if found.channels is None else RATE * late * found.channels
        choice = budget.choice(Worth(late * found.rankings[0].values, channels), g)
        for count, firm, how in product(texts, ridges, repairs):
            batches = batches_of(loaded, thinned(ground.fit(name), count))
            mlp = how == "least-squares-mlp"
            (repair,) = fit_repairs(loaded, [choice.units], batches, dtype=dtype, ridges=firm, mlp=mlp)
            tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
            case = {"scenario": name, "keep": budget.keep, "size": budget.size, "tilt": tilt, "ridges": list(firm)}
            case["repair"] = how
            measure = figures(own.divergence(choice.units, repair), off.divergence(choice.units, repair))
            yield {**case, "texts": count, "tokens": tokens, "parameters": share_of(g, choice), **measure}


@click.command()
@click.option("--model", required=True, help="A model folder or a hub name.")
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--scenarios", default=",".join(SCENARIOS), show_default=True)
@click.option("--fit", default=FIT, show_default=True, help="Texts that rank.")
@click.option("--texts", default="32", show_default=True, help="Of these, that repair.")
@click.option("--ridges", default="/".join(map(str, RIDGES)), show_default=True)
@click.option("--tilts", default=str(TILT), show_default=True)
@click.option("--keeps", default="0.75", show_default=True, help="Shares of the heads; empty for none.")
@click.option("--sizes", default="0.9,0.8", show_default=True, help="Shares of all parameters; empty for none.")
@click.option("--repairs", default="least-squares", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/repairs.jsonl"))
def main(model: str, data: Path, out: Path, fit: int, **asked: str) -> None:
    """Compare ridges and tilts."""
    parts = {name: [part for part in text.split(",") if part] for name, text in asked.items()}
    pairs = [Ridges(*map(float, pair.split("/"))) for pair in parts["ridges"]]
    budgets = [Budget("least-squares", "per-layer", float(keep)) for keep in parts["keeps"]]
    budgets += [Budget("least-squares", "per-layer", None, float(size)) for size in parts["sizes"]]
    ground = Ground(open_dense(model).load(), data, 0, fit)
    with out.open("a", encoding="utf-8") as file:
        for name in parts["scenarios"]:
            texts, tilts = [*map(int, parts["texts"])], [*map(float, parts["tilts"])]
            for row in rows(ground, name, budgets, texts, pairs, tilts, parts["repairs"]):
                file.write(json.dumps(row) + "\n")
                file.flush()
                click.echo(json.dumps(row))


if __name__ == "__main__":
    main()
