"""What a trimmed vocabulary is worth: sizes and losses by bound, and beside cuts of heads and channels, at equal size.

    python -m benchmarks.trimming --model SMOLLM2 --questions train.jsonl --judge test.jsonl [--off texts.jsonl]
                                  [--bounds 0.003/0.02,0.01/0.5] [--sizes 0.9,0.8,0.7]

The scenario is PROMPTS word problems with reference answers, as in `benchmarks.build`. A row *trim A/B* is `sspcompile
trim --max-loss A --max-loss-off B`. A row *cut S* is a per-layer `build` to the share S of all parameters; *trim, cut
S* trims first, by BOUND, and builds what is left to the same number of them. Each is judged on JUDGED problems that
nothing has seen, and on texts of `--off` (lines with `question` and `answer`, or `text`): perplexity of the answers,
times the dense model's, each model reading the same words in its own tokens, and the length of the texts in tokens.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import click
import torch

from benchmarks.build import COMMAND, JUDGED, PROMPTS, build, problems, run, write_prompts
from benchmarks.rows import Results, Row
from sspcompile.model.dense import open_dense
from sspcompile.model.loading import load_cut
from sspcompile.request.prompts import Prompt, answered, passage
from sspcompile.trimming.judging import TextCost, costs_of_texts, judged
from sspcompile.trimming.tokens import TokenLoss
from sspcompile.workspace import MODEL, TRIM

ASKED = "prompts.jsonl"
BOUND = "0.01/0.05"  # the default
# Of a passage; a model reads no more than 256 tokens of one, in whatever tokens.
WORDS = 90
Texts = Mapping[str, Sequence[Prompt]]
Costs = Mapping[str, Sequence[TextCost]]


def other_texts(path: Path) -> list[Prompt]:
    """The first lines of a file: questions with answers, or the beginnings of texts."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()[:JUDGED]]
    return [
        passage(" ".join(row["text"].split()[:WORDS])) if "text" in row else answered(row["question"], row["answer"])
        for row in rows
    ]


def lost(folder: Path, texts: Texts, dense: Costs) -> Row:
    """What a model folder loses on the texts, by their name."""
    model, found = load_cut(folder, trust_remote_code=True), {}
    for name, prompts in texts.items():
        one = judged(TokenLoss(0.0, 0.0, 0.0), dense[name], costs_of_texts(model, prompts), seed=0)
        assert one.perplexity is not None and one.length is not None
        found[name] = {"perplexity": asdict(one.perplexity), "length": one.length.value}
    return found


def folder_of(bound: str) -> str:
    return f"trim-{bound.replace('/', '-')}"


def parameters(folder: Path) -> int:
    checkpoint = open_dense(str(folder)).checkpoint
    return sum(torch.Size(info.shape).numel() for info in checkpoint.tensors.values())


def trimmed(model: str, bound: str, home: Path, texts: Texts, dense: Costs) -> Row:
    """`sspcompile trim` with bounds."""
    name, (own, off) = folder_of(bound), bound.split("/")
    shutil.rmtree(home / name, ignore_errors=True)
    words = ["trim", "--scenario", ASKED, "--model", model, "--out", name, "--quiet"]
    words += ["--max-loss", own, "--max-loss-off", off]
    cost = run([*COMMAND, *words], home)
    said = json.loads((home / name / TRIM).read_text("utf-8"))
    return {
        "tokens": said["tokens"]["trimmed"],
        "parameters": said["parameters"]["trimmed"] / said["parameters"]["dense"],
        "own_judge": said["judged"],
        **asdict(cost),
        **lost(home / name, texts, dense),
    }


def cut(model: str, size: float, whole: int, home: Path, texts: Texts, dense: Costs, *, first: bool) -> Row:
    """A build to `size` of `whole` parameters, of the model or (`first`) of what `trim` left of it."""
    start = str(home / folder_of(BOUND)) if first else model
    name = f"{'trim-' if first else ''}cut-{size:g}"
    shutil.rmtree(home / name, ignore_errors=True)
    words = ["--max-params", str(int(size * whole)), "--layout", "per-layer", "--baselines", "none"]
    if first and parameters(home / folder_of(BOUND)) <= size * whole:
        return {"parameters": parameters(Path(start)) / whole, **lost(Path(start), texts, dense)}
    cost = build(start, ASKED, name, home, words)
    plan = json.loads((home / name / "plan.json").read_text("utf-8"))
    share = plan["parameters"]["sliced"] / whole
    return {"parameters": share, **asdict(cost), **lost(home / name / MODEL, texts, dense)}


def told(name: str, texts: Texts) -> Callable[[Row], str]:
    def line(row: Row) -> str:
        said = []
        for part in texts:
            found = row[part]["perplexity"]
            said.append(
                f"{part} perplexity {found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f}), "
                f"length {row[part]['length']:.3f}"
            )
        return f"{name}: {row['parameters']:.1%} of the parameters; {'; '.join(said)}"

    return line


@click.command()
@click.option("--model", required=True, help="A model folder or a hub name.")
@click.option("--questions", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--judge", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--off", type=click.Path(exists=True, path_type=Path), help="Texts of another kind.")
@click.option("--prompts", default=PROMPTS, show_default=True)
@click.option("--bounds", default="0.003/0.02,0.01/0.5", show_default=True)
@click.option("--sizes", default="0.9,0.8,0.7", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where to build; a temporary folder by default.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/trimming.json"))
def main(
    model: str,
    questions: Path,
    judge: Path,
    off: Path | None,
    prompts: int,
    bounds: str,
    sizes: str,
    folder: Path | None,
    out: Path,
) -> None:
    """Trim by several bounds, and cut to several sizes with and without it."""
    model = str(Path(model).resolve()) if Path(model).is_dir() else model
    settings: Row = {"model": Path(model).name, "prompts": prompts, "threads": torch.get_num_threads()}
    results = Results(out, settings, goes_on=folder is not None)
    with tempfile.TemporaryDirectory() as temporary:
        home = (folder or Path(temporary)).resolve()
        home.mkdir(parents=True, exist_ok=True)
        write_prompts(home / ASKED, problems(questions, 0, prompts))
        texts: dict[str, Sequence[Prompt]] = {"own": [answered(*pair) for pair in problems(judge, 0, JUDGED)]}
        if off is not None:
            texts["off"] = other_texts(off)
        loaded = open_dense(model).load()
        dense = {name: costs_of_texts(loaded, asked) for name, asked in texts.items()}
        whole = parameters(loaded.path)
        del loaded
        for bound in dict.fromkeys((BOUND, *filter(None, bounds.split(",")))):
            results.row(
                f"trim {bound}", partial(trimmed, model, bound, home, texts, dense), told(f"trim {bound}", texts)
            )
        for size in map(float, filter(None, sizes.split(","))):
            for first, name in ((False, f"cut {size:g}"), (True, f"trim, cut {size:g}")):
                measure = partial(cut, model, size, whole, home, texts, dense, first=first)
                results.row(name, measure, told(name, texts))


if __name__ == "__main__":
    main()
