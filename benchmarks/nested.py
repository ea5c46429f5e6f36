"""What a nested artifact of a real model costs and loses, beside builds of one size each.

    python -m benchmarks.nested --model SMOLLM2 --questions train.jsonl --judge test.jsonl [--sizes 1,0.9,0.8,0.7]
                                [--own 0.9,0.8] [--folder DIR]

The scenario is PROMPTS word problems with reference answers, as in `benchmarks.build`. One `build --nested SIZES` comes
first, so it is the one that reads the model for the first time; then for each member of `--own` (all below 1 by
default) one `build --size S --layout per-layer` from the same prompts.

Both are judged on problems that no build has seen, a member as `slice --from` cuts it out. The gap is the KL of the
member minus that of the build of its own, paired over the problems. Beside them stand the bytes of the artifact over
the dense model's, `slice --from` against `cp` of what it writes (both synced, in alternation, the source read once
before each), a switch of sizes, what each build costs, and the smallest member as a draft, by `sspcompile bench`.

Every figure is printed and written as soon as it is known. With `--folder` a second run goes on where the first one
ended: what OUT holds of the same settings is not measured again.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from benchmarks.build import COMMAND, JUDGED, PROMPTS, bare_pass, build, foretell, lost, problems, told, write_prompts
from benchmarks.rows import Results, Row
from benchmarks.slice import copied, measured, warm
from sspcompile.api.arguments import named
from sspcompile.api.drafts import load_nested
from sspcompile.api.members import cut_member, open_member
from sspcompile.intervals import mean_estimate
from sspcompile.model.dense import open_dense
from sspcompile.model.text import MAX_TOKENS
from sspcompile.nested.index import read_nested
from sspcompile.request.amounts import shares_of
from sspcompile.workspace import MODEL, PLAN, Workspace

SIZES = "1,0.9,0.8,0.7"
NESTED = "nested"
ASKED = "prompts.jsonl"
# Of `slice --from` and `cp`, for each member.
ROUNDS = 3
SWITCHES = 200
# What the issue of nested models asks for: of the dense model's bytes, and of a switch in microseconds.
MOST_BYTES, MOST_MICROSECONDS = 1.15, 1000


@dataclass(frozen=True)
class Bench:
    """A model, the folder in which it is built, options for all builds, and what judges them."""

    model: str
    home: Path
    options: tuple[str, ...]
    asked: Sequence[tuple[str, str]]
    unseen: Sequence[tuple[str, str]]

    @property
    def nested(self) -> Path:
        return self.home / NESTED

    def bare(self) -> Row:
        """A forward pass over the problems of the scenario."""
        texts = [f"{question}\n{answer}" for question, answer in self.asked]
        seconds, tokens = bare_pass(self.model, texts, 2, MAX_TOKENS)
        return {"seconds": seconds, "tokens": tokens}

    def built(self, out: str, words: Sequence[str], bare: float) -> Row:
        """The cost of a build: foretold, in passes of `bare` seconds, and as it was."""
        every = [*words, "--layout", "per-layer", *self.options]
        foretold = foretell(self.model, ASKED, self.home, every)
        shutil.rmtree(self.home / out, ignore_errors=True)  # of a run that ended before its cost was written
        cost = build(self.model, ASKED, out, self.home, every)
        return {
            "passes": cost.wall / bare,
            "foretold_seconds": foretold["seconds"],
            "foretold_peak": foretold["peak_bytes"],
            **asdict(cost),
        }

    def judged(self, cut: Path) -> Row:
        found = lost(self.model, cut, self.unseen)
        parameters = json.loads((_artifact(cut) / PLAN).read_text("utf-8"))["parameters"]["sliced"]
        return {"parameters": parameters, **found.figures(), "kl_per_problem": list(found.divergence.kl_per_prompt)}

    def taken(self) -> Row:
        """Bytes of the weights of the whole and of all repairs, those of the dense model, and of everything else."""
        dense = sum(info.nbytes for info in open_dense(self.model).checkpoint.tensors.values())
        files = [path for path in self.nested.rglob("*") if path.is_file()]
        weights = sum(path.stat().st_size for path in files if path.suffix == ".safetensors")
        folder = sum(path.stat().st_size for path in files)
        members = [(one.share, one.repair_bytes) for one in read_nested(self.nested).members]
        return {"dense": dense, "nested": weights, "folder": folder, "repairs": dict(members), "ratio": weights / dense}

    def sliced(self, share: float) -> Row:
        """Seconds of `slice --from`, of the same where Python runs already, and of `cp` of what was written; the member
        stays."""
        out, copy = self.home / member(share), self.home / "copy"
        words = ["slice", "--from", str(self.nested), "--size", f"{share:g}", "--out", str(out), "--quiet"]
        seconds: dict[str, list[float]] = {"slice": [], "inside": [], "cp": []}
        for _ in range(ROUNDS):
            for name in seconds:
                for folder in (out,) if name == "cp" else (self.nested / MODEL, *self._repairs()):
                    warm(folder)
                if name == "cp":
                    seconds[name].append(copied(out, copy))
                    shutil.rmtree(copy)
                    continue
                shutil.rmtree(out, ignore_errors=True)
                if name == "slice":
                    seconds[name].append(measured([*COMMAND, *words])[0])
                else:
                    begun = time.perf_counter()
                    cut_member(open_member(self.nested, share), out)
                    seconds[name].append(time.perf_counter() - begun)
        medians = {name: statistics.median(taken) for name, taken in seconds.items()}
        written = sum(path.stat().st_size for path in out.iterdir())
        ratios = {f"{name}_ratio": medians[name] / medians["cp"] for name in ("slice", "inside")}
        return {"written_bytes": written, **seconds, **ratios}

    def _repairs(self) -> Iterator[Path]:
        found = read_nested(self.nested).members
        yield from ((self.nested / MODEL / one.repair).parent for one in found if one.repair is not None)

    def switched(self) -> Row:
        """Microseconds of `set_size`, from size to size."""
        model: Any = load_nested(named(str(self.nested), Workspace(self.home))).model
        taken = []
        for number in range(SWITCHES):
            begun = time.perf_counter()
            model.set_size(model.sizes[number % len(model.sizes)])
            taken.append(1e6 * (time.perf_counter() - begun))
        return {"median": statistics.median(taken), "p90": float(np.percentile(taken, 90)), "longest": max(taken)}

    def drafted(self, new_tokens: int, repeats: int) -> Row:
        return told(
            ["bench", str(self.nested), "--new-tokens", str(new_tokens), "--repeats", str(repeats), "--quiet"],
            self.home,
        )


def _artifact(cut: Path) -> Path:
    """The folder with the plan of a model: it is the model's own, or of the build that the model lies in."""
    return cut if (cut / PLAN).is_file() else cut.parent


def member(share: float) -> str:
    """The name of its row, and of the folder that `slice --from` writes."""
    return f"member-{share:g}"


def gap_of(one: Row, own: Row) -> Row:
    """KL of a member minus that of a build of its own, problem by problem."""
    gaps = np.subtract(one["kl_per_problem"], own["kl_per_problem"])
    return asdict(mean_estimate(gaps, seed=0))


def told_cost(what: str) -> Callable[[Row], str]:
    return lambda row: (
        f"{what}: {row['wall'] / 60:.1f} min ({row['foretold_seconds'] / 60:.1f} foretold), {row['passes']:.1f} "
        f"passes, {row['peak'] / 1e9:.2f} GB at the peak ({row['foretold_peak'] / 1e9:.2f} foretold)"
    )


def told_loss(what: str) -> Callable[[Row], str]:
    return lambda row: (
        f"{what}: {row['parameters'] / 1e6:.1f} M parameters, KL {row['kl']:.4f} ({row['kl_low']:.4f} to "
        f"{row['kl_high']:.4f}), same token {row['same_token']:.1%}, perplexity {row['perplexity_ratio']:.3f} "
        "times dense"
    )


def told_gap(share: float) -> Callable[[Row], str]:
    def line(row: Row) -> str:
        shown = f"gap at {share:g}, member minus own build: {row['value']:+.4f} nats"
        if row["low"] is None:
            return f"{shown}, of too few problems for an interval"
        verdict = "nothing measurable" if row["low"] <= 0 <= row["high"] else "more" if row["low"] > 0 else "less"
        return f"{shown} ({row['low']:+.4f} to {row['high']:+.4f}): the member loses {verdict}"

    return line


def told_bytes(row: Row) -> str:
    return (
        f"bytes: {row['nested'] / 1e6:.1f} MB of weights with all repairs, {row['ratio']:.3f} times the dense model "
        f"(asked: at most {MOST_BYTES}); {(row['folder'] - row['nested']) / 1e6:.1f} MB of other files"
    )


def told_slice(share: float) -> Callable[[Row], str]:
    return lambda row: (
        f"slice --from at {share:g}: {statistics.median(row['slice']):.2f} s, {row['slice_ratio']:.2f} times cp of its "
        f"{row['written_bytes'] / 1e6:.1f} MB; {row['inside_ratio']:.2f} times where Python runs already"
    )


def told_switch(row: Row) -> str:
    return (
        f"a switch: {row['median']:.0f} microseconds, 90 % within {row['p90']:.0f}, longest {row['longest']:.0f} "
        f"(asked: under {MOST_MICROSECONDS})"
    )


def told_draft(row: Row) -> str:
    accepted, speed = row["acceptance"], row["speedup"]
    between = ["" if one["low"] is None else f" ({one['low']:.2f} to {one['high']:.2f})" for one in (accepted, speed)]
    return (
        f"draft {row['draft']:g}: accepted {accepted['value']:.2f}{between[0]} of the proposed tokens; "
        f"{row['plain_tokens_per_second']:.1f} tokens/s alone, {row['assisted_tokens_per_second']:.1f} with it, "
        f"{speed['value']:.2f} times as fast{between[1]}; {row['same_texts']} of {len(row['texts'])} texts the same"
    )


def measure(
    bench: Bench, results: Results, shares: Sequence[float], own: Sequence[float], draft: Mapping[str, int]
) -> None:
    """All rows, the nested build's first."""
    results.row("bare", bench.bare, lambda row: f"a bare pass: {row['seconds']:.1f} s over {row['tokens']} tokens")
    bare, listed = results["bare"]["seconds"], ",".join(f"{share:g}" for share in shares)
    results.row(NESTED, lambda: bench.built(NESTED, ["--nested", listed], bare), told_cost(f"build --nested {listed}"))
    results.row("bytes", bench.taken, told_bytes)
    for share in shares[1:]:
        name = member(share)
        results.row(f"slice {share:g}", partial(bench.sliced, share), told_slice(share))
        results.row(name, partial(bench.judged, bench.home / name), told_loss(name))
    results.row("switch", bench.switched, told_switch)
    results.row("draft", lambda: bench.drafted(**draft), told_draft)
    for share in own:
        budget, name = ["--size", f"{share:g}"], f"own-{share:g}"
        results.row(
            f"build {share:g}", partial(bench.built, name, budget, bare), told_cost(f"build {' '.join(budget)}")
        )
        results.row(name, partial(bench.judged, bench.home / name / MODEL), told_loss(name))
        results.row(f"gap {share:g}", partial(gap_of, results[member(share)], results[name]), told_gap(share))


@click.command()
@click.option("--model", required=True, help="A model folder or a hub name.")
@click.option("--questions", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--judge", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--prompts", default=PROMPTS, show_default=True)
@click.option("--judged", default=JUDGED, show_default=True, help="Problems of --judge.")
@click.option("--sizes", default=SIZES, show_default=True)
@click.option("--own", help="Members that get a build of their own beside them; all below 1 by default.")
@click.option("--new-tokens", default=64, show_default=True, help="Of each text behind which the draft is measured.")
@click.option("--repeats", default=1, show_default=True, help="Of each such text; intervals are over texts.")
@click.option("--option", "more", multiple=True, help="Handed to every build, as --option=--max-tokens=64.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to build; a temporary folder by default.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/nested.json"))
def main(
    model: str,
    questions: Path,
    judge: Path,
    prompts: int,
    judged: int,
    sizes: str,
    own: str | None,
    new_tokens: int,
    repeats: int,
    more: tuple[str, ...],
    folder: Path | None,
    out: Path,
) -> None:
    """Measure a nested artifact beside builds of one size."""
    model = str(Path(model).resolve()) if Path(model).is_dir() else model
    shares = shares_of(sizes)
    wanted = shares[1:] if own is None else tuple(float(share) for share in own.split(",") if share)
    if not set(wanted) <= set(shares[1:]):
        raise click.BadParameter(f"--own is one of {', '.join(f'{share:g}' for share in shares[1:])}.")
    options = tuple(word for option in more for word in option.split("=", 1))
    settings: Row = {
        "model": Path(model).name,
        "prompts": prompts,
        "judged": judged,
        "sizes": list(shares),
        "options": list(options),
        "threads": torch.get_num_threads(),
    }
    goes_on = folder is not None and (folder / NESTED).is_dir()
    results = Results(out, settings, goes_on=goes_on)
    with tempfile.TemporaryDirectory() as temporary:
        home = (folder or Path(temporary)).resolve()
        home.mkdir(parents=True, exist_ok=True)
        bench = Bench(model, home, options, problems(questions, 0, prompts), problems(judge, 0, judged))
        write_prompts(home / ASKED, bench.asked)
        measure(bench, results, shares, wanted, {"new_tokens": new_tokens, "repeats": repeats})


if __name__ == "__main__":
    main()
