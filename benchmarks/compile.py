"""How long compiling takes once model and toolkit are loaded, against one forward pass over the scenario's text.

The forward pass is the bare decoder's, without lm_head, on batches that are ready. Compiling tokenises, runs the
decoder up to the last residual, and does the arithmetic down to the masks of both layouts; with importance from the
scenario's own prompts (`auto`) it also lets the model continue them and runs the criterion's passes.

    python benchmarks/compile.py [--scenario chemistry-helpdesk] [--repeats 30]

Prints one table: medians with p10 and p90 over the repeats, and the ratio to the forward pass.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from sspcompile.model.capture import features
from sspcompile.model.dense import open_dense
from sspcompile.model.text import encode
from sspcompile.prepare.toolkits import toolkit_for
from sspcompile.progress import silent
from sspcompile.request.request import Request, read_request
from sspcompile.select.reading import read_through
from sspcompile.select.scoring import cached_keys
from sspcompile.select.texts import Texts
from sspcompile.slicing.layouts import choose
from sspcompile.workspace import Workspace


def milliseconds(run: Callable[[], object], repeats: int) -> np.ndarray:
    """Wall time of each run, after three that do not count."""
    samples = []
    for number in range(repeats + 3):
        start = time.perf_counter()
        run()
        if number >= 3:
            samples.append(1000 * (time.perf_counter() - start))
    return np.array(samples)


@click.command()
@click.option("--scenario", default="chemistry-helpdesk", show_default=True)
@click.option("--model", default=None, help="A model folder; the embedded model by default.")
@click.option("--repeats", default=30, show_default=True)
def main(scenario: str, model: str | None, repeats: int) -> None:
    """Time the online stage."""
    cached, direct = (
        read_request(scenario, {"model": model, "importance_from": source}, os.environ)
        for source in ("domains", "auto")
    )
    options, texts = cached.options, cached.scenario.texts
    subject = open_dense(options.model)
    loaded = subject.load()
    toolkit, _ = toolkit_for(subject, loaded, options, Workspace(Path()), silent, cached_keys(cached))
    batches = encode(loaded, texts, options.max_tokens)
    g = subject.checkpoint.geometry

    def whole(request: Request) -> None:
        reading = read_through(request, toolkit, loaded, Texts(loaded, request.options), build=True)
        for layout in ("uniform", "per-layer"):
            choose(reading.merit, g.kv_heads, 0.5, layout)

    @torch.inference_mode()
    def forward() -> None:
        for batch in batches:
            loaded.model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)

    timed = {
        "forward pass over the scenario's text": milliseconds(forward, repeats),
        "features (tokenise, forward, pool)": milliseconds(
            lambda: features(loaded, texts, options.max_tokens), repeats
        ),
        "compile (features, mixture, scores, both layouts)": milliseconds(lambda: whole(cached), repeats),
        "compile, importance from the prompts": milliseconds(lambda: whole(direct), max(3, repeats // 5)),
    }
    base = np.median(timed["forward pass over the scenario's text"])
    title = f"{scenario}: {len(texts)} texts, {repeats} repeats"
    table = Table("stage", "median ms", "p10", "p90", "ratio", title=title)
    for name, samples in timed.items():
        p10, median, p90 = np.percentile(samples, [10, 50, 90])
        table.add_row(name, f"{median:.1f}", f"{p10:.1f}", f"{p90:.1f}", f"{median / base:.2f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
