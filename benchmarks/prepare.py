"""What `prepare` costs, in bare forward passes of the decoder over the same tokens.

    python benchmarks/prepare.py [--model DIR] [--repeats 5]

*Capture* is what probes, axes and calibration read: tokenising, batching and one pass with the hooks on every layer.
*Everything* is the whole of `prepare` with the named criteria; it also lets the model continue its prompts and runs the
criteria's own passes. The bare pass is the decoder's, without lm_head, on
batches that are ready. Prints medians, and ratios pair by pair.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from sspcompile.embedded import POOLS_DIR
from sspcompile.model.capture import features
from sspcompile.model.dense import open_dense
from sspcompile.model.text import encode
from sspcompile.prepare import prepare
from sspcompile.request.domains import load_outside, load_pools
from sspcompile.request.splits import fit_part

CRITERIA = (("fisher",), ("fisher", "subspace", "fisher-rounds"))


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@click.command()
@click.option("--model", default=None, help="A model folder; the embedded model by default.")
@click.option("--repeats", default=5, show_default=True)
def main(model: str | None, repeats: int) -> None:
    """Time capture, and the whole of prepare."""
    loaded = open_dense(model).load()
    pools, outside = fit_part(load_pools(POOLS_DIR)), load_outside(POOLS_DIR / "outside")
    prompts = [prompt for pool in pools for prompt in pool.prompts]
    batches = encode(loaded, prompts)

    @torch.inference_mode()
    def bare() -> None:
        for batch in batches:
            loaded.model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)

    runs: dict[str, Callable[[], object]] = {"capture": lambda: features(loaded, prompts)}
    runs |= {
        f"everything, {' and '.join(names)}": partial(prepare, loaded, pools, outside, criteria=names)
        for names in CRITERIA
    }
    table = Table("what", "s", "bare pass s", "ratio", "range", title=f"{len(prompts)} prompts, {repeats} repeats")
    for name, run in runs.items():
        bare(), run()
        pairs = np.array([(seconds(run), seconds(bare)) for _ in range(repeats if name == "capture" else 2)])
        ratios = pairs[:, 0] / pairs[:, 1]
        table.add_row(
            name,
            f"{np.median(pairs[:, 0]):.2f}",
            f"{np.median(pairs[:, 1]):.2f}",
            f"{np.median(ratios):.2f}",
            f"{ratios.min():.2f} to {ratios.max():.2f}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
