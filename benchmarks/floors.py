"""Whether builds that are given a bound on the loss hold it, and how much smaller they could have been.

    python -m benchmarks.floors --model SMOLLM2 --data DIR [--scenarios word-problems,...] [--seeds 4] [--prompts 96]
                                [--max-loss 0.05 | --max-perplexity 1.05]
                                [--fine word-problems] [--steps -0.03,-0.02,-0.01,0]

A row is a whole build by `--max-loss` or `--max-perplexity`, of one of the scenarios of `benchmarks.real` with PROMPTS
texts drawn by a seed. It has the share of the parameters that was found, the share of the next tokens that changes on
the build's own judging texts and on UNSEEN others, which the build never saw, and how many times as perplexing replies
are there (reference answers, and of what has none what the dense model would write), with their intervals. `--fine`
builds that scenario of seed 0 again by `--size`, so far from what was found: the smallest of them whose loss on the
same judging texts is within the bound is the best that a fine sweep finds. With `--folder` a second run goes on where
the first one ended.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import click
import torch

from benchmarks.build import build
from benchmarks.real import SCENARIOS
from benchmarks.rows import Results, Row
from sspcompile.model.dense import open_dense
from sspcompile.model.divergence import Divergence, DivergenceAccumulator
from sspcompile.model.loading import load_cut
from sspcompile.model.text import CONTINUATION_TOKENS, batches_of, continued
from sspcompile.report.json import read_report
from sspcompile.request.prompts import Passage, Prompt
from sspcompile.select.judging import references_of
from sspcompile.workspace import MODEL, REPORT

UNSEEN = 48
MAX_TOKENS = 256
# Of a build that writes nothing, because no mask is within the bound; its row is that sentence.
NONE_HELD = "No mask "
OPTIONS = ("--baselines", "none", "--layout", "per-layer", "--max-tokens", str(MAX_TOKENS))


def write_texts(path: Path, prompts: Sequence[Prompt]) -> None:
    """A prompts file, answers included."""

    def line(prompt: Prompt) -> dict[str, object]:
        if isinstance(prompt, Passage):
            return {"text": prompt.text}
        if isinstance(prompt, str):
            return {"prompt": prompt}
        return {"messages": [{"role": one.role, "content": one.content} for one in prompt]}

    path.write_text("".join(json.dumps(line(prompt)) + "\n" for prompt in prompts), "utf-8")


@torch.inference_mode()
def divergence(model: str, cut: Path, prompts: Sequence[Prompt], new_tokens: int = CONTINUATION_TOKENS) -> Divergence:
    """Of a cut from its dense model, on texts that no build has seen; the dense model writes `new_tokens` behind those
    without an answer.
    """
    dense, other = open_dense(model).load(), load_cut(cut, trust_remote_code=True)
    collected, texts = DivergenceAccumulator(), continued(dense, prompts, new_tokens, MAX_TOKENS)
    for batch in batches_of(dense, texts):
        owner = torch.tensor(batch.rows)[batch.score_mask.nonzero()[:, 0]]
        read = (batch.input_ids, batch.attention_mask, batch.score_mask)
        wanted = references_of(batch, texts)
        collected.add(dense.scored_logits(*read), other.scored_logits(*read), owner, wanted)
    return collected.result()


def built(model: str, name: str, home: Path, asked: str, words: Sequence[str], unseen: Sequence[Prompt]) -> Row:
    """What a build found, and what it loses on its own judging texts and on others."""
    shutil.rmtree(home / name, ignore_errors=True)  # of a run that ended before its row was written
    try:
        cost = build(model, asked, name, home, (*words, *OPTIONS))
    except click.ClickException as error:
        if NONE_HELD not in error.message:
            raise
        return {"refused": error.message}
    report = read_report(home / name / REPORT)
    ours, budget = next(row for row in report.quality if row.role == "ours"), report.budget
    assert budget is not None
    found, replies = divergence(model, home / name / MODEL, unseen), ours.reply_perplexity
    assert replies is not None
    return {
        "parameters": budget.size_achieved,
        "tried": [*zip(*zip(*budget.measured, strict=True), budget.at_most, strict=True)] if budget.measured else [],
        "perplexities": budget.perplexities,
        "judge": asdict(ours.top1_agreement.rest),
        "unseen": asdict(found.changed),
        "replies": {"judge": asdict(replies), "unseen": asdict(found.reply_perplexity)},
        **asdict(cost),
    }


def told(name: str, bound: float | None, most: float | None) -> Callable[[Row], str]:
    """Of a row, whether it keeps within the bound on the loss, or on the perplexity of replies."""

    def line(row: Row) -> str:
        if "refused" in row:
            return f"{name}: {row['refused']}"
        judge, unseen = (
            f"{row[part]['value']:.1%} ({row[part]['low']:.1%} to {row[part]['high']:.1%})"
            for part in ("judge", "unseen")
        )
        # Rows of earlier versions have no replies.
        of_replies = row.get("replies", {}).items()
        times = {part: f"{one['value']:.3f} ({one['low']:.3f} to {one['high']:.3f})" for part, one in of_replies}
        replies = f"; replies {times['judge']} times as perplexing, unseen {times['unseen']}" if times else ""
        held = row["judge"]["value"] <= bound if bound is not None else row["replies"]["judge"]["value"] <= (most or 1)
        verdict = "held" if held else "NOT HELD"
        return (
            f"{name}: {row['parameters']:.1%} of the parameters; changed {judge}, unseen {unseen}{replies}: {verdict}"
        )

    return line


@click.command()
@click.option("--model", required=True, help="A model folder or a hub name.")
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--scenarios", default=",".join(SCENARIOS), show_default=True)
@click.option("--seeds", default=4, show_default=True)
@click.option("--prompts", default=96, show_default=True)
@click.option("--max-loss", "bound", type=float, help="0.05 where nothing else is bounded.")
@click.option("--max-perplexity", "most", type=float)
@click.option("--fine", default="", help="A scenario that is built again by size.")
@click.option("--steps", default="-0.03,-0.02,-0.01,0", show_default=True, help="From the size that was found.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to build; a temporary folder by default.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="benchmarks/results/floors.json, or floors-perplexity.json."
)
def main(
    model: str,
    data: Path,
    scenarios: str,
    seeds: int,
    prompts: int,
    bound: float | None,
    most: float | None,
    fine: str,
    steps: str,
    folder: Path | None,
    out: Path | None,
) -> None:
    """Build to a bound on the loss, many times."""
    model = str(Path(model).resolve()) if Path(model).is_dir() else model
    if bound is not None and most is not None:
        raise click.UsageError("--max-loss and --max-perplexity are measured one at a time.")
    bound = 0.05 if bound is None and most is None else bound
    asked = ("--max-loss", str(bound)) if most is None else ("--max-perplexity", str(most))
    of = {"bound": bound} if most is None else {"max_perplexity": most}
    settings = {"model": Path(model).name, "prompts": prompts, **of, "reply": CONTINUATION_TOKENS}
    out = out or Path("benchmarks/results") / ("floors.json" if most is None else "floors-perplexity.json")
    results = Results(out, settings, goes_on=folder is not None)
    with tempfile.TemporaryDirectory() as temporary:
        home = (folder or Path(temporary)).resolve()
        home.mkdir(parents=True, exist_ok=True)
        for seed in range(seeds):
            for scenario in scenarios.split(","):
                drawn = random.Random(seed).sample(SCENARIOS[scenario](data), prompts + UNSEEN)
                name, texts, unseen = f"{scenario}-{seed}", f"{scenario}-{seed}.jsonl", drawn[prompts:]
                write_texts(home / texts, drawn[:prompts])
                results.row(name, partial(built, model, name, home, texts, asked, unseen), told(name, bound, most))
                if (scenario, seed) != (fine, 0) or "refused" in results[name]:
                    continue
                for step in steps.split(","):
                    size = round(results[name]["parameters"] + float(step), 3)
                    measure = partial(built, model, f"{name}-{size:g}", home, texts, ("--size", str(size)), unseen)
                    results.row(f"{name}, size {size:g}", measure, told(f"{name}, size {size:g}", bound, most))


if __name__ == "__main__":
    main()
