"""What a build of a real model costs: bare forward passes over the texts that it reads, minutes, and peak memory.

    python -m benchmarks.build --model SMOLLM2 --questions train.jsonl --judge test.jsonl [--only first,second,sentence]

The scenario is PROMPTS word problems of the user's own with reference answers (lines `{"question": ..., "answer":
...}`, as GSM8K has them). *first*: the first build of the model. *second*: another scenario of as many other
problems, the model having been read before. *sentence*: a scenario in one sentence, which reads the domain pools
instead. A pass is a bare forward pass of the decoder, without lm_head, over the same texts on the same threads; each
figure is the wall time of the whole command over that of the pass, both taken in this run. Peak memory is that of the
command with all that it starts. `--busy N` starts N processes that do nothing but compute, and repeats *first* beside
them.

What was lost is measured apart, on problems of `--judge` that no build has seen: KL from the dense model and same next
token over the answers, and their perplexity.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch

from sspcompile.model.dense import open_dense
from sspcompile.model.divergence import Divergence, DivergenceAccumulator
from sspcompile.model.loading import load_cut
from sspcompile.model.text import MAX_TOKENS, batches_of, continued, encode
from sspcompile.prepare.recognition import OUTSIDE_PROMPTS, corpus_of, recognised_part, recognised_tokens
from sspcompile.request.domains import load_outside, load_pools
from sspcompile.request.prompts import answered
from sspcompile.request.splits import fit_part

PROMPTS = 128
JUDGED = 32
SENTENCE = "A tutor who solves word problems about money, time and quantities step by step"
BUSY = "while True: pass"
COMMAND = (sys.executable, "-m", "sspcompile.cli.main")


@dataclass(frozen=True)
class Cost:
    """Wall and processor seconds of a command, its peak resident memory in bytes, and its exit code."""

    wall: float
    cpu: float
    peak: int
    code: int


# The peak of a process counts what lay in memory when it was forked: a small process starts the one that is measured.
STARTER = """
import json, os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, used = os.wait4(process.pid, 0)
wall, code = time.perf_counter() - start, os.waitstatus_to_exitcode(status)
print(json.dumps([wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, code]))
"""


def run(command: Sequence[str], folder: Path) -> Cost:
    """One command in a folder, with everything that it starts."""
    starter = [sys.executable, "-c", STARTER, *command]
    done = subprocess.run(starter, cwd=folder, capture_output=True, text=True, check=True)
    cost = Cost(*json.loads(done.stdout))
    if cost.code:
        raise click.ClickException(done.stderr.strip().splitlines()[-1])
    return cost


def build(model: str, scenario: str, out: str, folder: Path, words: Sequence[str]) -> Cost:
    """`sspcompile build`; `words` are its budget and other options."""
    return run([*COMMAND, "build", "--scenario", scenario, "--model", model, "--out", out, "--quiet", *words], folder)


def foretell(model: str, scenario: str, folder: Path, words: Sequence[str]) -> dict[str, Any]:
    """`sspcompile plan --cost` of the same."""
    return told(["plan", "--scenario", scenario, "--model", model, "--cost", *words], folder)


def told(words: Sequence[str], folder: Path) -> dict[str, Any]:
    """What a command of sspcompile says with --json."""
    done = subprocess.run([*COMMAND, *words, "--json"], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(done.stderr.strip().splitlines()[-1])
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def problems(path: Path, first: int, count: int) -> list[tuple[str, str]]:
    """Questions and answers of a file."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()[first : first + count]]
    return [(row["question"], row["answer"]) for row in rows]


def write_prompts(path: Path, asked: Sequence[tuple[str, str]]) -> None:
    """A prompts file of questions with their reference answers."""
    lines = [json.dumps({"prompt": question, "answer": answer}) for question, answer in asked]
    path.write_text("\n".join(lines) + "\n", "utf-8")


@torch.inference_mode()
def bare_pass(model: str, texts: Sequence[str], repeats: int, max_tokens: int) -> tuple[float, int]:
    """Least seconds of a forward pass over the texts, and their tokens."""
    loaded = open_dense(model).load()
    batches = encode(loaded, texts, max_tokens)
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        for batch in batches:
            loaded.model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        taken.append(time.perf_counter() - start)
    return min(taken), sum(int(batch.attention_mask.sum()) for batch in batches)


@dataclass(frozen=True)
class Lost:
    """KL from the dense model and same next token, problem by problem; perplexities over the tokens of all answers."""

    divergence: Divergence
    perplexity_dense: float
    perplexity_cut: float

    def figures(self) -> dict[str, float]:
        kl = self.divergence.mean_kl
        return {
            "kl": kl.value,
            "kl_low": kl.low or 0.0,
            "kl_high": kl.high or 0.0,
            "same_token": self.divergence.top1_agreement.value,
            "perplexity_dense": self.perplexity_dense,
            "perplexity_cut": self.perplexity_cut,
            "perplexity_ratio": self.perplexity_cut / self.perplexity_dense,
        }


@torch.inference_mode()
def lost(model: str, cut: Path, asked: Sequence[tuple[str, str]]) -> Lost:
    """What a cut loses over the answers of problems as they are deployed: the problem is the user's turn, the answer
    the assistant's."""
    dense, other = open_dense(model).load(), load_cut(cut, trust_remote_code=True)
    items = continued(dense, [answered(question, answer) for question, answer in asked])
    collected, sums, tokens = DivergenceAccumulator(), [0.0, 0.0], 0
    for batch in batches_of(dense, items):
        owner = torch.tensor(batch.rows)[batch.score_mask.nonzero()[:, 0]]
        targets = batch.input_ids.roll(-1, 1)[batch.score_mask]
        read = (batch.input_ids, batch.attention_mask, batch.score_mask)
        logits = dense.scored_logits(*read), other.scored_logits(*read)
        collected.add(*logits, owner)
        tokens += len(targets)
        for place, one in enumerate(logits):
            sums[place] += float(torch.nn.functional.cross_entropy(one.double(), targets, reduction="sum"))
    before, after = (float(torch.tensor(total / tokens).exp()) for total in sums)
    return Lost(collected.result(), before, after)


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Processes that compute, as long as the block lasts."""
    started = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


@click.command()
@click.option("--model", required=True, help="A model folder or a hub name.")
@click.option("--questions", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--judge", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--prompts", default=PROMPTS, show_default=True)
@click.option("--keep", default=0.75, show_default=True)
@click.option("--only", default="first,second,sentence", show_default=True)
@click.option("--busy", "beside", default=0, help="Repeat the first build beside so many busy processes.")
@click.option("--option", "more", multiple=True, help="Handed to `sspcompile build`, as --option=--layout=per-layer.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to build; a temporary folder by default.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/build.json"))
def main(
    model: str,
    questions: Path,
    judge: Path,
    prompts: int,
    keep: float,
    only: str,
    beside: int,
    more: tuple[str, ...],
    folder: Path | None,
    out: Path,
) -> None:
    """Count the passes of builds."""
    model = str(Path(model).resolve()) if Path(model).is_dir() else model
    words = ["--keep", str(keep), *(word for option in more for word in option.split("=", 1))]
    with tempfile.TemporaryDirectory() as temporary:
        home = folder or Path(temporary)
        home.mkdir(parents=True, exist_ok=True)
        own = [problems(questions, start * prompts, prompts) for start in range(2)]
        for number, asked in enumerate(own):
            write_prompts(home / f"prompts-{number}.jsonl", asked)
        threads = torch.get_num_threads()
        rows: dict[str, object] = {"model": Path(model).name, "prompts": prompts, "keep": keep, "threads": threads}
        kinds = [kind for kind in ("first", "second", "sentence") if kind in only.split(",")]
        for kind in kinds:
            read, most = [f"{q}\n{a}" for q, a in own[kind == "second"]], MAX_TOKENS
            if kind == "sentence":
                outside = recognised_part(load_outside(), OUTSIDE_PROMPTS)
                read = [*corpus_of(recognised_part(fit_part(load_pools()))).texts, *corpus_of(outside).texts]
                most = recognised_tokens(MAX_TOKENS)
            seconds, tokens = bare_pass(model, read, 2, most)
            scenario = SENTENCE if kind == "sentence" else f"prompts-{int(kind == 'second')}.jsonl"
            foretold = foretell(model, scenario, home, words)
            cost = build(model, scenario, kind, home, words)
            figures = lost(model, home / kind / "model", problems(judge, 0, JUDGED)).figures()
            rows[kind] = {
                "tokens": tokens,
                "bare_pass_seconds": seconds,
                "passes": cost.wall / seconds,
                "foretold_seconds": foretold["seconds"],
                "foretold_peak": foretold["peak_bytes"],
                **asdict(cost),
                **figures,
            }
            click.echo(
                f"{kind}: {cost.wall / seconds:.1f} passes of {seconds:.1f} s over {tokens} tokens, "
                f"{cost.wall / 60:.1f} min ({foretold['seconds'] / 60:.1f} foretold), {cost.peak / 1e9:.2f} GB "
                f"({foretold['peak_bytes'] / 1e9:.2f} foretold); KL {figures['kl']:.3f}, same token "
                f"{figures['same_token']:.1%}, perplexity {figures['perplexity_ratio']:.3f} times dense"
            )
        if beside:
            with busy(beside), tempfile.TemporaryDirectory() as fresh:
                write_prompts(Path(fresh) / "prompts-0.jsonl", own[0])
                cost = build(model, "prompts-0.jsonl", "busy", Path(fresh), words)
            rows["busy"] = {"processes": beside, **asdict(cost)}
            click.echo(f"beside {beside} busy processes: {cost.wall / 60:.1f} min, {cost.cpu / 60:.1f} of processor")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
