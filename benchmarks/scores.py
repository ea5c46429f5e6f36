"""Which heads to cut on a real model: masks by several scores, all repaired on the same texts, judged on unseen ones.

    python -m benchmarks.scores --model SMOLLM2 --questions train.jsonl --judge test.jsonl [--scores obs,fisher,...]
        [--tilted obs,...] [--per-layer] [--prompts 96] [--judged 24]

--prompts word problems, question and answer (lines `{"question": ..., "answer": ...}`, as GSM8K has them), score the
heads: `obs` and `fisher` come from one gradient pass over the texts (one draw each), any other name is measured as
`prepare` does. Scores are taken as they are; those of --tilted also as a build takes `obs`, rising from the first layer
to the last. Masks per-layer and, without --per-layer, of every uniform shape inside each budget are repaired on FIT of
the texts. --judged problems that nothing has seen judge them: KL from the dense model and same next token, on the dense
model's continuations and at the end of the text.
"""

from __future__ import annotations

import itertools
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
from sspcompile.select.scoring import CURVATURE_TEXTS, measured_rankings, tilted
from sspcompile.slicing.layouts import Choice, choose, uniform_choices

FIT = 32
MEASURED = ("obs", "fisher")


def scored(loaded: LoadedModel, texts: Sequence[Sentence], names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Names with their scores [layers, heads], without a tilt."""
    if set(names) & set(MEASURED):
        for ranking in measured_rankings(loaded, texts, 0, "head", no_steps, repair="none"):
            if ranking.name in names:
                yield ranking.name, ranking.values
    for name in names:
        if name not in MEASURED:
            yield name, measure(loaded, name, thinned(texts, CURVATURE_TEXTS)).values.mean(0)


def masks(values: np.ndarray, kv_heads: int, keep: float, *, per_layer: bool) -> Iterator[tuple[str, Choice]]:
    """The layouts of a score within a budget, or `per_layer` alone."""
    yield "per-layer", choose(values, kv_heads, keep, "per-layer")
    for choice in () if per_layer else uniform_choices(values, kv_heads, keep):
        groups, each = choice.shapes[0]
        yield f"uniform, {groups} groups of {each}", choice


@click.command()
@click.option("--model", required=True, help="A model folder or a hub name.")
@click.option("--questions", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--judge", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--scores", default=",".join(MEASURED), show_default=True, help="Criteria, with commas between them.")
@click.option("--tilted", "tilts", default="", help="Those of the scores that are tried with a tilt by depth too.")
@click.option("--per-layer", is_flag=True, help="No uniform layouts.")
@click.option("--keeps", default="0.75,0.5", show_default=True)
@click.option("--prompts", default=96, show_default=True, help="Problems that score heads.")
@click.option("--judged", default=24, show_default=True, help="Problems that judge masks.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/scores.json"))
def main(
    model: str,
    questions: Path,
    judge: Path,
    scores: str,
    tilts: str,
    per_layer: bool,
    keeps: str,
    prompts: int,
    judged: int,
    out: Path,
) -> None:
    """Compare scores."""
    names, also = scores.split(","), tilts.split(",") if tilts else []
    if strangers := sorted(set(also) - set(names)):
        raise click.UsageError(f"Not among the scores: {', '.join(strangers)}.")
    if unknown := sorted(set(names) - set(CRITERIA)):
        raise click.UsageError(f"No such criterion: {', '.join(unknown)}.")
    dense = open_dense(model)
    loaded = dense.load()
    asked, unseen = (
        continued(loaded, [f"{question}\n{answer}" for question, answer in problems(path, 0, count)])
        for path, count in ((questions, prompts), (judge, judged))
    )
    held = {
        "continuation": HeldOut(loaded, unseen),
        "text": HeldOut(loaded, [Sentence(one.ids[: one.prompt], 1) for one in unseen]),
    }
    rows, listed, seconds = [], [], {}
    begun = time.perf_counter()
    for name, values in scored(loaded, asked, names):
        seconds[name], begun = time.perf_counter() - begun, time.perf_counter()
        click.echo(f"{name} took {seconds[name]:.0f} s", err=True)
        tried = [(name, values)]
        if name in also:
            tried.append((f"{name}, tilted", tilted(loaded.geometry.layers) * values))
        for keep, (label, scored_heads) in itertools.product(map(float, keeps.split(",")), tried):
            layouts = masks(scored_heads, loaded.geometry.kv_heads, keep, per_layer=per_layer)
            listed += [(label, keep, layout, choice) for layout, choice in layouts]
    batches = batches_of(loaded, thinned(asked, FIT))
    kept = [choice.units for *_, choice in listed]
    fitted = fit_repairs(loaded, kept, batches, dtype=refitted_dtype(dense.checkpoint))
    for (name, keep, layout, choice), repair in zip(listed, fitted, strict=True):
        row: dict[str, object] = {"score": name, "keep": keep, "layout": layout}
        for where, texts in held.items():
            lost = texts.divergence(choice.units, repair)
            row |= {f"kl_{where}": lost.mean_kl.value, f"same_{where}": lost.top1_agreement.value}
        rows.append(row)
        click.echo(json.dumps(row))
    out.parent.mkdir(parents=True, exist_ok=True)
    found = {"model": Path(model).name, "prompts": prompts, "fit": FIT, "judged": judged, "seconds": seconds}
    out.write_text(json.dumps(found | {"rows": rows}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
