"""Which heads to cut on a real model: masks by several scores, all repaired on the same texts, judged on unseen ones.

    python -m benchmarks.scores --model SMOLLM2 --questions train.jsonl --judge test.jsonl [--scores obs,fisher,...]

PROMPTS word problems, question and answer (lines `{"question": ..., "answer": ...}`, as GSM8K has them), score the
heads: `obs` and `fisher` come from one gradient pass over the texts (one draw each), any other name is measured as
`prepare` does. Masks per-layer and of every uniform shape inside each budget are repaired on FIT of the texts. JUDGED
problems that nothing has seen judge them: KL from the dense model and same next token, on the dense model's
continuations and at the end of the text.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import numpy as np

from benchmarks.build import problems
from sspcompile.criteria import CRITERIA
from sspcompile.criteria.measuring import measure
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.dense import open_dense
from sspcompile.model.text import Sentence, batches_of, continued
from sspcompile.progress import no_steps
from sspcompile.repair.fitting import fit_repairs
from sspcompile.repair.repair import refitted_dtype
from sspcompile.request.splits import thinned
from sspcompile.select.judging import HeldOut
from sspcompile.select.scoring import CURVATURE_TEXTS, measured_rankings
from sspcompile.slicing.layouts import Choice, choose, uniform_choices

PROMPTS, FIT, JUDGED = 96, 32, 24
MEASURED = ("obs", "fisher")


def scored(loaded: LoadedModel, texts: Sequence[Sentence], names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Names with their scores [layers, heads]."""
    if set(names) & set(MEASURED):
        for ranking in measured_rankings(loaded, texts, 0, "head", no_steps):
            if ranking.name in names:
                yield ranking.name, ranking.values
    for name in names:
        if name not in MEASURED:
            yield name, measure(loaded, name, thinned(texts, CURVATURE_TEXTS)).values.mean(0)


def masks(values: np.ndarray, kv_heads: int, keep: float) -> Iterator[tuple[str, Choice]]:
    """The layouts of a score within a budget."""
    yield "per-layer", choose(values, kv_heads, keep, "per-layer")
    for choice in uniform_choices(values, kv_heads, keep):
        groups, each = choice.shapes[0]
        yield f"uniform, {groups} groups of {each}", choice


@click.command()
@click.option("--model", required=True, help="A model folder or a hub name.")
@click.option("--questions", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--judge", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--scores", default=",".join(MEASURED), show_default=True, help="Criteria, with commas between them.")
@click.option("--keeps", default="0.75,0.5", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/scores.json"))
def main(model: str, questions: Path, judge: Path, scores: str, keeps: str, out: Path) -> None:
    """Compare scores."""
    names = scores.split(",")
    if unknown := sorted(set(names) - set(CRITERIA)):
        raise click.UsageError(f"No such criterion: {', '.join(unknown)}.")
    dense = open_dense(model)
    loaded = dense.load()
    asked, unseen = (
        continued(loaded, [f"{question}\n{answer}" for question, answer in problems(path, 0, count)])
        for path, count in ((questions, PROMPTS), (judge, JUDGED))
    )
    held = {
        "continuation": HeldOut(loaded, unseen),
        "text": HeldOut(loaded, [Sentence(one.ids[: one.prompt], 1) for one in unseen]),
    }
    rows, listed, seconds = [], [], {}
    begun = time.perf_counter()
    for name, values in scored(loaded, asked, names):
        seconds[name], begun = time.perf_counter() - begun, time.perf_counter()
        for keep in map(float, keeps.split(",")):
            listed += [(name, keep, layout, choice) for layout, choice in masks(values, loaded.geometry.kv_heads, keep)]
    batches = batches_of(loaded, thinned(asked, FIT))
    kept = [choice.units for *_, choice in listed]
    fitted = fit_repairs(loaded, kept, batches, dtype=refitted_dtype(dense.checkpoint))
    for (name, keep, layout, choice), repair in zip(listed, fitted, strict=True):
        row: dict[str, object] = {"score": name, "keep": keep, "layout": layout}
        for where, texts in held.items():
            found = texts.divergence(choice.units, repair)
            row |= {f"kl_{where}": found.mean_kl.value, f"same_{where}": found.top1_agreement.value}
        rows.append(row)
        click.echo(json.dumps(row))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"model": Path(model).name, "seconds": seconds, "rows": rows}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
