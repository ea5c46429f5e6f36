"""What a cut costs real deployments on a real model: own scenario against others, by score, budget and layout.

    python -m benchmarks.real --model SMOLLM2 --data DIR [--scenarios word-problems,...] [--seeds 1] [--keeps 0.75,0.5]
                              [--sizes 0.9,0.8] [--scores obs,FLAP,...] [--repairs least-squares,none,published]
                              [--questions 64]

DIR holds public sets (`gsm8k`, `openstax`, `squad2`, `tatqa`, `banking77`, `wikitext2`; for questions `arc_csqa` and
`mmlu`). A scenario is FIT texts of one of them; JUDGED others judge it, and as many of the other scenarios, together,
what it costs off the scenario. Texts with a reference answer are scored on it, others on the dense model's own
continuation.

A budget is a share of the heads (`--keeps`) or of all parameters (`--sizes`, heads and channels of the MLPs together).
A row is a mask: by a score on the scenario's own texts (`obs`, `fisher`), by `obs` on texts of all scenarios alike
(`domain-free`) or of another one (`wrong domain`), each repaired on the texts that chose it, and units at random with
the first layer kept (repaired on the scenario's own). With a share of all parameters there are rows for published
pruners of heads and channels too (`sspcompile/select/peers.py`), repaired alike. Rows that OUT holds already are not
measured again.

`--repairs published` measures those pruners with what their authors repair by: FLAP with its biases, the others without
a repair (and LLM-Pruner without its fine-tuning). The gap of every row is to `obs` on the scenario's own texts with the
same repair, of `published` rows with least squares.

With `--questions N` every row answers N questions of ARC-Easy, and of MMLU where the scenario has a subject there, by
the likelihood of their options (exams.py); of the scenario's judging texts with a reference answer it says how many
greedy decoding would write as they are.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import product
from pathlib import Path
from typing import cast

import click
import numpy as np
import torch

from benchmarks.exams import Exam, exams_of
from benchmarks.exams import figures as graded
from sspcompile.criteria.chance import first_layer_kept
from sspcompile.families import Geometry
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.dense import open_dense
from sspcompile.model.divergence import Divergence, compare_divergences
from sspcompile.model.text import Sentence, batches_of, continued
from sspcompile.progress import no_steps, silent
from sspcompile.repair.biases import fit_biases
from sspcompile.repair.fitting import fit_repairs
from sspcompile.repair.repair import Repair, refitted_dtype
from sspcompile.request.prompts import Prompt, answered
from sspcompile.request.splits import thinned
from sspcompile.select.judging import HeldOut
from sspcompile.select.peers import FLAP, PEERS, peers
from sspcompile.select.reading import RATE
from sspcompile.select.scoring import Measured
from sspcompile.select.scoring import measured as measured_costs
from sspcompile.slicing.layouts import Choice, choose
from sspcompile.slicing.mask import Kept, Layout
from sspcompile.slicing.measures import of_size
from sspcompile.slicing.sizes import Worth, channel_parameters, choose_per_layer, head_share, share_of, uniform_sizes

FIT, REPAIRED, JUDGED = 64, 32, 24
LONGEST = 320  # tokens of a prompt


def word_problems(data: Path) -> list[Prompt]:
    rows = [json.loads(line) for line in (data / "gsm8k" / "train.jsonl").read_text("utf-8").split("\n") if line]
    return [answered(row["question"], row["answer"]) for row in rows]


def textbook(data: Path) -> list[Prompt]:
    rows = [json.loads(line) for line in (data / "openstax" / "chemistry.jsonl").read_text("utf-8").split("\n") if line]
    return _halves([row["text"] for row in rows])


def reading(data: Path) -> list[Prompt]:
    """Passages and tables with a question whose answer stands in them."""
    found: list[Prompt] = []
    for article in json.loads((data / "squad2" / "dev-v2.0.json").read_text("utf-8"))["data"]:
        for part in article["paragraphs"]:
            asked = next((qa for qa in part["qas"] if qa["answers"]), None)
            if asked is not None:
                found.append(answered(f"{part['context']}\n\n{asked['question']}", asked["answers"][0]["text"]))
    for item in json.loads((data / "tatqa" / "tatqa_dataset_dev.json").read_text("utf-8")):
        table = "\n".join(" | ".join(row) for row in item["table"]["table"])
        asked = item["questions"][0]
        answer = asked["answer"]
        told = ", ".join(map(str, answer)) if isinstance(answer, list) else str(answer)
        found.append(answered(f"{table}\n\n{asked['question']}", told))
    return found


def support(data: Path) -> list[Prompt]:
    with (data / "banking77" / "train.csv").open(encoding="utf-8", newline="") as file:
        return [row["text"] for row in csv.DictReader(file)]


def general(data: Path) -> list[Prompt]:
    return _halves((data / "wikitext2" / "wt2_valid.txt").read_text("utf-8").splitlines())


def _halves(texts: Sequence[str]) -> list[Prompt]:
    """Of paragraphs long enough, the second half as the answer to the first."""
    split = [text.split() for text in texts if 60 <= len(text.split()) <= 250]
    return [answered(" ".join(w[: len(w) // 2]), " ".join(w[len(w) // 2 :])) for w in split]


SCENARIOS: Mapping[str, Callable[[Path], list[Prompt]]] = {
    "word-problems": word_problems,
    "chemistry": textbook,
    "reading": reading,
    "support": support,
    "general": general,
}
NAMES = ("obs", "fisher", "domain-free", "wrong domain", "random")
PUBLISHED = "published"


class Ground:
    """The texts of all scenarios of one seed, written once: the first `fit` of each choose, JUDGED more judge."""

    def __init__(self, loaded: LoadedModel, data: Path, seed: int, fit: int = FIT) -> None:
        self.loaded = loaded
        self._fit = fit
        self._data, self._seed = data, seed
        self._held: dict[str, tuple[HeldOut, HeldOut]] = {}
        self._texts: dict[str, list[Sentence]] = {}
        self._asked: dict[str, list[Prompt]] = {}
        # What others are compared with, by scenario and budget.
        self.ours: dict[tuple[str, Budget], Divergence] = {}
        for name, read in SCENARIOS.items():
            drawn = random.Random(seed).sample(read(data), self._fit + JUDGED)
            self._texts[name] = continued(loaded, drawn, max_tokens=LONGEST)
            self._asked[name] = drawn[self._fit :]

    def fit(self, name: str) -> list[Sentence]:
        """Texts that choose and repair: of one scenario, or of all alike."""
        if name in self._texts:
            return self._texts[name][: self._fit]
        alike = self._fit // len(self._texts)
        return [text for texts in self._texts.values() for text in thinned(texts[: self._fit], alike)]

    def exams(self, name: str, count: int) -> Exams:
        """What every mask of a scenario is asked: nothing for a `count` of 0."""
        if not count:
            return Exams({}, {})
        exams = exams_of(self.loaded, self._data, name, self._asked[name], count, self._seed)
        return Exams(exams, {title: exam.found() for title, exam in exams.items()})

    def judged(self, name: str) -> tuple[HeldOut, HeldOut]:
        """Held-out texts of a scenario, and of the others together."""
        if name not in self._held:
            others = [texts[self._fit :] for other, texts in self._texts.items() if other != name]
            off = [text for texts in others for text in thinned(texts, JUDGED // len(others))]
            self._held = {name: (HeldOut(self.loaded, self._texts[name][self._fit :]), HeldOut(self.loaded, off))}
        return self._held[name]


@dataclass(frozen=True)
class Exams:
    """Exams by name, and what the dense model gets right."""

    exams: Mapping[str, Exam]
    dense: Mapping[str, np.ndarray]

    def told(self, kept: Kept, repair: Repair | None) -> dict[str, object]:
        """What a mask gets right, of every exam."""
        found = {name: exam.found(kept, repair) for name, exam in self.exams.items()}
        return {"exams": graded(found, self.dense)} if found else {}


def scored(ground: Ground, name: str, seed: int, wanted: Collection[str] = NAMES) -> Iterator[tuple[str, Worth, str]]:
    """Names of `wanted` with what units are worth, and whose texts repair; `obs` always, and first."""

    def of(texts: Sequence[Sentence]) -> Measured:
        return measured_costs(ground.loaded, texts, 0, "head", no_steps)

    def own(found: Measured) -> Worth:
        heads, _ = found.rankings
        return Worth(heads.values, None if found.channels is None else RATE * found.channels)

    found = of(ground.fit(name))
    heads, fisher = found.rankings
    yield heads.name, own(found), name
    if fisher.name in wanted:
        yield fisher.name, Worth(fisher.values / 2, found.channels), name
    if "domain-free" in wanted:
        yield "domain-free", own(of(ground.fit("all"))), "all"
    if "wrong domain" in wanted:
        wrong = [*SCENARIOS][([*SCENARIOS].index(name) + 1) % len(SCENARIOS)]
        yield "wrong domain", own(of(ground.fit(wrong))), wrong
    if "random" in wanted:
        g = ground.loaded.geometry
        channels = channel_parameters(g) * first_layer_kept((g.layers, g.intermediate), seed)
        yield "random", Worth(head_share(g) * first_layer_kept((g.layers, g.heads), seed), channels), name
    asked = [peer for peer in PEERS if peer in wanted]
    for peer, worth in peers(ground.loaded, ground.fit(name), silent, channels=True, names=asked):
        yield peer, worth, name


@dataclass(frozen=True)
class Budget:
    """`size` is a share of all parameters, `keep` one of the heads; one of them is None."""

    repair: str
    layout: Layout
    keep: float | None
    size: float | None = None

    def choice(self, worth: Worth, g: Geometry) -> Choice:
        if self.size is None:
            return choose(worth.heads, g.kv_heads, self.keep or 1.0, self.layout)
        if self.layout == "uniform":
            return uniform_sizes(worth, g, (of_size(g, self.size),))[0]
        return choose_per_layer(worth, g, (of_size(g, self.size),))

    def names(self, asked: Sequence[str]) -> list[str]:
        """Those of the scores that have a row: published ones count parameters, and alone are repaired in own ways."""
        return [
            one
            for one in asked
            if (one not in PEERS or self.size is not None) and (one in PEERS or self.repair != PUBLISHED)
        ]

    def fitted(self, score: str, kept: Kept, ground: Ground, whose: str, dtype: torch.dtype) -> Repair | None:
        """The repair of a mask, on texts of whom it was chosen by."""
        texts = batches_of(ground.loaded, thinned(ground.fit(whose), REPAIRED))
        if self.repair == PUBLISHED and score in PEERS:
            return fit_biases(ground.loaded, [kept], texts, dtype=dtype, anywhere=True)[0] if score == FLAP else None
        if self.repair == "none":
            return None
        return next(iter(fit_repairs(ground.loaded, [kept], texts, dtype=dtype)))


# What tells rows apart.
KEY = ("model", "scenario", "seed", "repair", "layout", "keep", "size", "score")
Ranked = Sequence[tuple[str, Worth, str]]


def measured(
    ground: Ground, name: str, ranked: Ranked, budget: Budget, dtype: torch.dtype, wanted: Collection[str], exams: Exams
) -> Iterator[dict[str, object]]:
    """A row for every wanted mask of a budget, beside the first one, which others are compared with."""
    loaded, (own, off) = ground.loaded, ground.judged(name)
    compared = (name, replace(budget, repair="least-squares") if budget.repair == PUBLISHED else budget)
    for place, (score, worth, whose) in enumerate(ranked):
        if score not in wanted and (place or compared in ground.ours):
            continue
        choice = budget.choice(worth, loaded.geometry)
        kept, left = choice.units, share_of(loaded.geometry, choice)
        fitted = budget.fitted(score, kept, ground, whose, dtype)
        found = own.divergence(kept, fitted)
        ours = ground.ours.setdefault(compared, found)
        if score in wanted:
            gap = compare_divergences(found, ours)
            told = figures(found, off.divergence(kept, fitted)) | exams.told(kept, fitted)
            row = {"score": score, "kept": choice.ratio, "parameters": left, **told}
            yield row | {"kl_above_obs": [gap.value, gap.low, gap.high]}


def figures(found: Divergence, off: Divergence) -> dict[str, object]:
    ratio = found.perplexity
    return {
        "kl": found.mean_kl.value,
        "changed": 1 - found.top1_agreement.value,
        "perplexity": None if ratio is None else [ratio.value, ratio.low, ratio.high],
        "off_kl": off.mean_kl.value,
        "off_changed": 1 - off.top1_agreement.value,
    }


@click.command()
@click.option("--model", required=True, help="A model folder or a hub name.")
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--scenarios", default=",".join(SCENARIOS), show_default=True)
@click.option("--seeds", default=1, show_default=True)
@click.option("--keeps", default="0.75,0.5", show_default=True, help="Shares of the heads; empty for none.")
@click.option("--sizes", default="0.9,0.8", show_default=True, help="Shares of all parameters; empty for none.")
@click.option("--layouts", default="per-layer", show_default=True)
@click.option("--repairs", default="least-squares", show_default=True, help="least-squares, none, published.")
@click.option("--scores", default=",".join((*NAMES, *PEERS)), show_default=True, help="Which rows.")
@click.option("--questions", default=0, show_default=True, help="Of every exam; 0 for no exams.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/real.jsonl"))
def main(
    model: str, data: Path, scenarios: str, seeds: int, out: Path, scores: str, questions: int, **budgeted: str
) -> None:
    """Compare masks on real deployments."""
    dense = open_dense(model)
    loaded, dtype = dense.load(), refitted_dtype(dense.checkpoint)
    lines = out.read_text("utf-8").splitlines() if out.exists() else []
    rows = [json.loads(line) for line in lines]
    known = {tuple(row.get(part) for part in KEY) for row in rows if not questions or "exams" in row}
    budgets = [*_budgets(**budgeted)]
    for seed in range(seeds):
        ground = Ground(loaded, data, seed)
        for name in scenarios.split(","):
            case = (Path(dense.name).name, name, seed)
            missing = {
                one: [score for score in one.names(scores.split(",")) if (*case, *astuple(one), score) not in known]
                for one in budgets
            }
            wanted = {score for some in missing.values() for score in some}
            ranked = [*scored(ground, name, seed, wanted)] if wanted else []
            exams = ground.exams(name, questions if wanted else 0)
            for budget, some in missing.items():
                for row in measured(ground, name, ranked if some else (), budget, dtype, some, exams):
                    row = dict(zip(KEY, (*case, *astuple(budget), row["score"]), strict=True)) | row
                    with out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                    click.echo(json.dumps(row))


def _budgets(keeps: str, sizes: str, layouts: str, repairs: str) -> Iterator[Budget]:
    for repair, layout in product(repairs.split(","), layouts.split(",")):
        named = cast(Layout, layout)
        yield from (Budget(repair, named, float(keep)) for keep in filter(None, keeps.split(",")))
        yield from (Budget(repair, named, None, float(size)) for size in filter(None, sizes.split(",")))


if __name__ == "__main__":
    main()
