"""Does the mixture name real text right: prompts and one-sentence descriptions of a domain, and text of none?

    python -m benchmarks.recognition --model SMOLLM2 --data DIR

DIR holds public sets that nobody here wrote: `xdomainbench` (pools of six domains, descriptions of its scenarios, a
subject of no domain), `mmlu` (questions of seven domains), `banking77` (messages to a bank). Each text is a scenario of
its own: it is named right when its own domain has the largest weight. A text is called unknown above the unknown share
that a tenth of the domains' prompts exceed (a false alarm of 10 %), and beside it by the toolkit's own line, from the
pools. That subject, biology, is one of those that teach what no domain is; it is asked for once more with a
toolkit that never saw it. The shipped scenarios, whose prompts are no pool's, show what a mixture of many prompts says.
"""

from __future__ import annotations

import csv
import json
import random
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from sspcompile.embedded import SCENARIOS_DIR
from sspcompile.model.capture import features
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.dense import open_dense
from sspcompile.prepare import prepare
from sspcompile.prepare.recognition import recognised_tokens
from sspcompile.prepare.stages import Stages
from sspcompile.prepare.toolkit import Toolkit
from sspcompile.request.domains import load_outside, load_pools
from sspcompile.request.recipe import shipped_recipes
from sspcompile.request.scenario import read_scenario
from sspcompile.request.splits import fit_part, thinned
from sspcompile.select.mixture import mixture_of

FALSE_ALARM = 0.1
UNKNOWN = "biology"
TOKENS = 512
SCENARIO_TEXTS = 16


@dataclass(frozen=True)
class Item:
    """A text of the set `source`; `domain` is None where it fits none."""

    source: str
    domain: str | None
    text: str


def read(data: Path, each: int) -> Iterator[Item]:
    """At most `each` texts of every set and domain."""
    draw = random.Random(0)

    def some(texts: list[str]) -> list[str]:
        return draw.sample(texts, min(each, len(texts)))

    sets = data / "xdomainbench"
    for path in sorted((sets / "val").glob("*.json")):
        for text in some(json.loads(path.read_text("utf-8"))):
            yield Item("xdomainbench prompts", path.stem, text)
    for path in sorted((data / "mmlu").glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
        asked = [_lettered(row["question"], row["choices"]) for row in rows if row["split"] != "test"]
        for text in some(asked):
            yield Item("mmlu prompts", path.stem, text)
    with (data / "banking77" / "train.csv").open(encoding="utf-8", newline="") as file:
        for text in some([row["text"] for row in csv.DictReader(file)]):
            yield Item("banking77 prompts", "customer-support", text)
    for path in sorted((sets / "test" / "selected_domain").glob("*.json")):
        found = {row["topic_description"] for row in json.loads(path.read_text("utf-8"))}
        for text in some(sorted(found)):
            yield Item("descriptions", path.stem, text)
    for path in sorted((sets / "test" / "out_of_domain").glob(f"{UNKNOWN}.json")):
        turns = [turn["prompt"] for row in json.loads(path.read_text("utf-8")) for turn in row["turns"]]
        for text in some(sorted(set(turns))):
            yield Item("unknown", None, text)


def shipped(toolkit: Toolkit, loaded: LoadedModel) -> dict[str, dict[str, object]]:
    """What the shipped scenarios for real models are made of: the three largest weights, and the unknown share."""
    layers = toolkit.learned.layers.tolist()
    found: dict[str, dict[str, object]] = {}
    for path in shipped_recipes():
        if path.parent == SCENARIOS_DIR:
            continue
        scenario, _ = read_scenario(path.stem)
        texts = thinned(scenario.texts, SCENARIO_TEXTS)
        read = features(loaded, texts, recognised_tokens(TOKENS), layers=layers, bare=True)
        mixture = mixture_of(toolkit, read)
        most = np.argsort(-mixture.weights)[:3]
        found[path.stem] = {
            "mixture": {mixture.domains[k]: round(float(mixture.weights[k]), 4) for k in most},
            "unknown": round(mixture.unknown, 4),
            "fits_no_domain": mixture.is_unknown,
        }
    return found


def _lettered(question: str, choices: list[str]) -> str:
    return "\n".join([question, *(f"{name}. {choice}" for name, choice in zip("ABCD", choices, strict=True))])


def judged(toolkit: Toolkit, items: list[Item], found: np.ndarray) -> dict[str, object]:
    """Shares named right by set and domain, and how well unknown text is told; `found` [N, R, d]."""
    mixtures = [mixture_of(toolkit, one[None]) for one in found]
    right, unknown = defaultdict(list), defaultdict(list)
    for item, mixture in zip(items, mixtures, strict=True):
        named = mixture.domains[int(mixture.weights.argmax())]
        kind = "unknown" if item.domain is None else "known"
        if item.source != "descriptions":
            unknown[kind].append(mixture.unknown)
        if item.domain is not None:
            right[item.source].append(named == item.domain)
            right[f"{item.source}: {item.domain}"].append(named == item.domain)
    line, own = float(np.quantile(unknown["known"], 1 - FALSE_ALARM)), mixtures[0].unknown_line
    return {
        "named_right": {name: [float(np.mean(hits)), len(hits)] for name, hits in sorted(right.items())},
        "line_at_false_alarm": line,
        "unknown_found": float(np.mean(np.array(unknown["unknown"]) > line)),
        "product_line": own,
        "product_false_alarm": float(np.mean(np.array(unknown["known"]) > own)),
        "product_unknown_found": float(np.mean(np.array(unknown["unknown"]) > own)),
        "held_out_pool_text": toolkit.meta["recognition"],
    }


@click.command()
@click.option("--model", required=True, help="A model folder or a hub name.")
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--each", default=60, show_default=True, help="Texts of every set and domain.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/recognition.json"))
def main(model: str, data: Path, each: int, out: Path) -> None:
    """Name real text."""
    loaded = open_dense(model).load()
    outside, items = load_outside(), list(read(data, each))
    with tempfile.TemporaryDirectory() as folder:
        # Both read the same pools: the second one finds what the first one measured.
        stages = Stages(loaded, Path(folder))
        toolkit, without = (
            prepare(loaded, fit_part(load_pools()), subjects, criteria=(), stages=stages)
            for subjects in (outside, tuple(pool for pool in outside if pool.name != UNKNOWN))
        )
    layers = toolkit.learned.layers.tolist()
    found = features(loaded, [item.text for item in items], recognised_tokens(TOKENS), layers=layers, bare=True)
    unseen = judged(without, items, found)
    scenarios = shipped(toolkit, loaded)
    rows: dict[str, Any] = {
        "model": Path(model).name,
        "texts": len(items),
        **judged(toolkit, items, found),
        "scenarios": scenarios,
        f"without_{UNKNOWN}": {name: value for name, value in unseen.items() if name != "named_right"},
    }
    for name, (share, count) in rows["named_right"].items():
        click.echo(f"{name:36} {share:6.1%} of {count}")
    for name, facts in scenarios.items():
        click.echo(f"{name:36} {facts['mixture']}, unknown {facts['unknown']}")
    for name, row in (("", rows), (f", {UNKNOWN} never seen", unseen)):
        click.echo(
            f"unknown text found{name}: {row['unknown_found']:.1%} at a false alarm of {FALSE_ALARM:.0%}; "
            f"by the toolkit's line {row['product_unknown_found']:.1%} at {row['product_false_alarm']:.1%}"
        )
    out.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
