"""How many tokens the dense model should write behind prompts that have no answers.

    python -m benchmarks.replies --model SMOLLM2 --data DIR [--scenarios word-problems,support] [--tokens 16,64]
                                 [--size 0.9] [--prompts 96]

A row is a whole build by `--size` from PROMPTS prompts without their answers, behind which the dense model writes so
many tokens: they are all that is scored, repaired and judged. The scenario `sentence` is SENTENCE alone, for which
prompts of the domain pools stand in; word problems judge it. What a build loses is measured on UNSEEN other prompts, on
their reference answers where they have some, and on replies of the dense model of LONG tokens. With `--folder` a second
run goes on where the first one ended, and judges builds that are there as they are.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import click

from benchmarks.build import SENTENCE, build
from benchmarks.floors import OPTIONS, UNSEEN, divergence, write_texts
from benchmarks.real import SCENARIOS
from benchmarks.rows import Results, Row
from sspcompile.model.divergence import Divergence
from sspcompile.request.prompts import Prompt, answer_of, asked_of
from sspcompile.workspace import MODEL

LONG = 128


def figures(found: Divergence) -> Row:
    row = {"kl": asdict(found.mean_kl), "changed": asdict(found.changed)}
    return row if found.perplexity is None else {**row, "perplexity": asdict(found.perplexity)}


def built(model: str, name: str, home: Path, asked: str, words: Sequence[str], unseen: Sequence[Prompt]) -> Row:
    """What a build loses on replies, and on answers where there are some."""
    cost: Row = {}
    if not (home / name / MODEL).is_dir():
        cost = asdict(build(model, asked, name, home, (*words, *OPTIONS)))
    cut, prompts = home / name / MODEL, [asked_of(prompt) for prompt in unseen]
    row = {**cost, "replies": figures(divergence(model, cut, prompts, new_tokens=LONG))}
    if all(answer_of(prompt) is not None for prompt in unseen):
        row["answers"] = figures(divergence(model, cut, unseen))
    return row


def told(name: str) -> Callable[[Row], str]:
    def line(row: Row) -> str:
        parts = [
            f"{part} KL {row[part]['kl']['value']:.3f}, {row[part]['changed']['value']:.1%} changed"
            for part in ("replies", "answers")
            if part in row
        ]
        return f"{name}: {'; '.join(parts)}"

    return line


@click.command()
@click.option("--model", required=True, help="A model folder or a hub name.")
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--scenarios", default="word-problems,support", show_default=True)
@click.option("--tokens", default="16,64", show_default=True)
@click.option("--size", default=0.9, show_default=True)
@click.option("--prompts", default=96, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where to build; a temporary folder by default.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/replies.json"))
def main(
    model: str, data: Path, scenarios: str, tokens: str, size: float, prompts: int, folder: Path | None, out: Path
) -> None:
    """Build from prompts without answers, with replies of several lengths."""
    model = str(Path(model).resolve()) if Path(model).is_dir() else model
    settings = {"model": Path(model).name, "prompts": prompts, "size": size}
    results = Results(out, settings, goes_on=folder is not None)
    with tempfile.TemporaryDirectory() as temporary:
        home = (folder or Path(temporary)).resolve()
        home.mkdir(parents=True, exist_ok=True)
        for scenario in scenarios.split(","):
            texts = SCENARIOS["word-problems" if scenario == "sentence" else scenario](data)
            drawn, asked = random.Random(0).sample(texts, prompts + UNSEEN), SENTENCE
            if scenario != "sentence":
                asked = f"{scenario}-{prompts}.jsonl"
                write_texts(home / asked, [asked_of(prompt) for prompt in drawn[:prompts]])
            for count in map(int, tokens.split(",")):
                name = f"{Path(model).name}-{scenario}-{prompts}-{count}-{size:g}"
                words = ("--size", str(size), "--continuation-tokens", str(count))
                row = f"{scenario}, {count} tokens"
                results.row(row, partial(built, model, name, home, asked, words, drawn[prompts:]), told(row))


if __name__ == "__main__":
    main()
