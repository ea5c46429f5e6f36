"""Quality at a given size: every head score, at equal budgets, with and without repair, in both layouts.

    python -m benchmarks.quality [--seeds 3] [--items 60] [--workers 2] [--out benchmarks/results/quality]

For each of the six domains of the embedded model a scenario of PROMPTS generated prompts (other ones per seed) chooses
heads and fits repairs; the masked model then answers held-out items of that domain and, for the price of it, items of
the other five. No prompt that chose or repaired is ever asked. Exact match is that of greedy decoding.

Rows are scores, and `auto`, the product's default: the mask that select/search.py finds best on the scenario's
own prompts.

Work is done in jobs whose results are kept in the output folder, so an interrupted run goes on where it stopped;
`quality_tables.py` turns them into the tables and the figure.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.progress import track

from sspcompile.criteria import CRITERIA
from sspcompile.criteria.measuring import measure
from sspcompile.embedded import POOLS_DIR
from sspcompile.evaluate.answers import EncodedItems, answer_scores, encode_items
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.dense import open_dense
from sspcompile.model.text import MAX_TOKENS, Batch, Sentence, batches_of, continued
from sspcompile.prepare.directions import probe_directions
from sspcompile.prepare.stages import Stages
from sspcompile.progress import no_steps, silent
from sspcompile.repair.biases import fit_biases
from sspcompile.repair.fitting import fit_repairs
from sspcompile.repair.repair import Repair, masked
from sspcompile.request.domains import load_pools
from sspcompile.request.options import Options
from sspcompile.request.splits import Splits, fit_part
from sspcompile.select.judging import Judge
from sspcompile.select.scoring import CACHED, measured_rankings
from sspcompile.select.search import best_of, masks_of
from sspcompile.select.texts import Texts as Continued
from sspcompile.slicing.layouts import Choice, choose
from sspcompile.slicing.mask import Kept, Layout
from training.corpus import DOMAINS, items

Cell = tuple[Layout, float]
KEEPS = (0.75, 0.5, 0.375, 0.25)
LAYOUTS: tuple[Layout, ...] = ("per-layer", "uniform")
CELLS: tuple[Cell, ...] = tuple((layout, keep) for layout in LAYOUTS for keep in KEEPS)
PROMPTS = 96
"""Prompts of a scenario. They come from the generator's training split, as a user's would from the user's logs."""
PROMPT_SEED, ITEM_SEED = 7000, 8000
OFF_DOMAIN_ITEMS = 6
CONTINUATION_TOKENS = 16
NOT_COMPARED = ("fisher-sampled", "fisher-greedy")
"""Variants of a score that is compared already."""
OURS, RANKED_BY = "auto", CACHED
DOMAIN_FREE, DOMAIN_FREE_MASK = f"{OURS}, domain-free", f"{OURS}, domain-free mask"
RANKED_FREE, RANKED_FREE_MASK = f"{RANKED_BY}, domain-free", f"{RANKED_BY}, domain-free mask"
FIRST_LAYER = "random-first-layer"


@dataclass(frozen=True)
class Texts:
    """What a scenario shows: its prompts, and with the dense model's continuations, as items and as batches."""

    prompts: tuple[str, ...]
    sentences: tuple[Sentence, ...]
    batches: tuple[Batch, ...]


@functools.cache
def model() -> LoadedModel:
    """The embedded model, once per process."""
    torch.set_num_threads(1)
    return open_dense(None).load()


@functools.cache
def scenario(domain: str, seed: int) -> Texts:
    """The prompts of one domain for one seed."""
    prompts = tuple(item.prompt for item in items(domain, "train", PROMPT_SEED + seed, PROMPTS))
    sentences = continued(model(), prompts, CONTINUATION_TOKENS)
    return Texts(prompts, tuple(sentences), tuple(batches_of(model(), sentences)))


@functools.cache
def mixed(seed: int) -> Texts:
    """As many prompts as a scenario has, of all domains in equal parts: what there is to see without a scenario."""
    share = PROMPTS // len(DOMAINS)
    prompts = tuple(prompt for domain in DOMAINS for prompt in scenario(domain, seed).prompts[:share])
    sentences = tuple(sentence for domain in DOMAINS for sentence in scenario(domain, seed).sentences[:share])
    return Texts(prompts, sentences, tuple(batches_of(model(), sentences)))


@functools.cache
def asked(domain: str, seed: int, count: int) -> EncodedItems:
    """Held-out items of one domain."""
    return encode_items(model(), items(domain, "heldout", ITEM_SEED + seed, count))


def directions() -> np.ndarray:
    """Probe directions for the published score, [L, K, d]."""
    found, _ = probe_directions(Stages(model()), fit_part(load_pools(POOLS_DIR)), 0, MAX_TOKENS, silent)
    return found


def score_job(seed: int, criterion: str, unit: np.ndarray | None, out: Path) -> None:
    """Scores [L, H, K] of one criterion, each domain's from its own scenario."""
    path = out / f"scores-{seed}-{criterion}.npy"
    if path.exists():
        return
    texts = [sentence for domain in DOMAINS for sentence in scenario(domain, seed).sentences]
    labels = np.repeat(np.arange(len(DOMAINS)), PROMPTS)
    found = measure(model(), criterion, texts, labels=labels, directions=unit, seed=seed)
    _store(path, lambda part: np.save(part, found.by_domain(len(DOMAINS))))


def candidates(out: Path, seed: int, domain: str) -> Iterator[tuple[str, np.ndarray, Texts]]:
    """(row of the table, scores [L, H], texts for the repair) of everything that is compared for one scenario."""
    k, own = DOMAINS.index(domain), scenario(domain, seed)
    for name in CRITERIA:
        if name not in NOT_COMPARED:
            yield name, np.load(out / f"scores-{seed}-{name}.npy")[..., k], own
    free = np.load(out / f"scores-{seed}-{RANKED_BY}.npy").mean(-1)
    yield RANKED_FREE, free, mixed(seed)
    yield RANKED_FREE_MASK, free, own


def repairs(row: str, masks: list[Kept], texts: Texts) -> dict[str, list[Repair | None]]:
    """The repairs that a row is judged with, one per mask: two for every row, more for some."""
    fit = functools.partial(fit_repairs, model(), masks, texts.batches, dtype=torch.float32)
    found: dict[str, list[Repair | None]] = {"none": [None] * len(masks), "least-squares": list(fit())}
    if row in (OURS, RANKED_BY, RANKED_FREE, FIRST_LAYER):
        found["least-squares-mlp"] = list(fit(mlp=True))
    if row in (RANKED_BY, "flap"):
        found["flap-bias"] = list(fit_biases(model(), masks, texts.batches, dtype=torch.float32))
    return found


@dataclass(frozen=True)
class Answers:
    """Of one model on one scenario's items: right or not per item, own domain and others; mean log-likelihood."""

    own: np.ndarray
    off: np.ndarray
    likelihood: float


def answer(kept: Kept, repair: Repair | None, domain: str, seed: int, count: int) -> Answers:
    """Ask the masked, repaired model."""
    with masked(model(), kept, repair):
        own = answer_scores(model(), asked(domain, seed, count))
        others = [
            answer_scores(model(), asked(other, seed, OFF_DOMAIN_ITEMS)).right for other in DOMAINS if other != domain
        ]
    return Answers(own.right, np.concatenate(others), float(own.log_likelihood.mean()))


def judge_job(seed: int, domain: str, count: int, out: Path) -> None:
    """Every cell of one scenario: rows x layouts x keep ratios x repairs, and the dense model."""
    path = out / f"cells-{seed}-{domain}.npz"
    if path.exists():
        return
    shape = (model().geometry.layers, model().geometry.heads)
    cells: dict[str, np.ndarray] = {}
    add(cells, "dense/-/1/none", 1.0, answer(Kept(np.ones(shape, dtype=bool)), None, domain, seed, count))
    seen: dict[tuple[bytes, int, str], Answers] = {}
    for row, scores, texts in candidates(out, seed, domain):
        chosen = {cell: choose(scores, model().geometry.kv_heads, cell[1], cell[0]) for cell in CELLS}
        for name, fitted in repairs(row, [choice.units for choice in chosen.values()], texts).items():
            for ((layout, keep), choice), repair in zip(chosen.items(), fitted, strict=True):
                same = (choice.units.key, id(texts), name)
                if same not in seen:
                    seen[same] = answer(choice.units, repair, domain, seed, count)
                add(cells, f"{row}/{layout}/{keep:g}/{name}", choice.ratio, seen[same])
    cells["counts"] = np.array([count, OFF_DOMAIN_ITEMS * (len(DOMAINS) - 1)])
    _store(path, functools.partial(_packed, cells))


def shortlisted(texts: Texts, seed: int) -> dict[Cell, Choice]:
    """The default's masks."""
    options = Options(max_tokens=MAX_TOKENS, continuation_tokens=CONTINUATION_TOKENS, seed=seed)
    splits = Splits(texts.prompts, (), (), (), len(texts.prompts), 0, 0)
    judge = Judge(model(), splits, options, Continued(model(), options), dtype=torch.float32)
    ranked = measured_rankings(model(), judge.sentences, seed, "head", no_steps)
    nobody = np.zeros(ranked[0].values.shape, dtype=bool)
    groups = model().geometry.kv_heads

    def best(layout: Layout, keep: float) -> Choice:
        return best_of(judge, {layout: masks_of(ranked, layout, nobody, keep, groups)})[layout].choice

    return {cell: best(*cell) for cell in CELLS}


def mixed_job(seed: int, out: Path) -> None:
    """The default's masks for prompts of all domains."""
    path = out / f"mixed-{seed}.npz"
    if path.exists():
        return
    found = shortlisted(mixed(seed), seed)
    arrays: dict[str, np.ndarray] = {}
    for (layout, keep), choice in found.items():
        arrays |= {f"kept-{layout}-{keep:g}": choice.kept, f"shapes-{layout}-{keep:g}": np.array(choice.shapes)}
    _store(path, functools.partial(_packed, arrays))


def mixed_masks(seed: int, out: Path) -> dict[Cell, Choice]:
    """What `mixed_job` left."""
    with np.load(out / f"mixed-{seed}.npz") as found:
        return {
            (layout, keep): Choice(
                found[f"kept-{layout}-{keep:g}"], tuple((int(g), int(r)) for g, r in found[f"shapes-{layout}-{keep:g}"])
            )
            for layout, keep in CELLS
        }


def default_job(seed: int, domain: str, count: int, out: Path) -> None:
    """The cells of `auto`: for the scenario, for prompts of all domains, and the latter's mask with own repair."""
    path = out / f"default-{seed}-{domain}.npz"
    if path.exists():
        return
    own = scenario(domain, seed)
    mine, free = shortlisted(own, seed), mixed_masks(seed, out)
    cells: dict[str, np.ndarray] = {}
    for row, chosen, texts in ((OURS, mine, own), (DOMAIN_FREE, free, mixed(seed)), (DOMAIN_FREE_MASK, free, own)):
        for name, fitted in repairs(row, [choice.units for choice in chosen.values()], texts).items():
            for ((layout, keep), choice), repair in zip(chosen.items(), fitted, strict=True):
                found = answer(choice.units, repair, domain, seed, count)
                add(cells, f"{row}/{layout}/{keep:g}/{name}", choice.ratio, found)
    _store(path, functools.partial(_packed, cells))


def add(cells: dict[str, np.ndarray], key: str, ratio: float, found: Answers) -> None:
    cells[f"{key}/own"], cells[f"{key}/off"] = np.packbits(found.own), np.packbits(found.off)
    cells[f"{key}/facts"] = np.array([ratio, found.likelihood])


def _packed(arrays: Mapping[str, Any], part: Path) -> None:
    np.savez_compressed(part, **arrays)


def _store(path: Path, write: Callable[[Path], object]) -> None:
    """Whole or absent, whenever the run is stopped."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / path.name
        write(part)
        part.replace(path)


@click.command()
@click.option("--seeds", default=3, show_default=True, help="Scenarios per domain, each with prompts of its own.")
@click.option("--items", "count", default=60, show_default=True, help="Held-out items per scenario.")
@click.option("--workers", default=2, show_default=True, help="Processes, of one thread each.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/quality"), show_default=True)
def main(seeds: int, count: int, workers: int, out: Path) -> None:
    """Measure every cell."""
    out.mkdir(parents=True, exist_ok=True)
    unit = directions()
    names = [name for name in CRITERIA if name not in NOT_COMPARED]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        scoring = [pool.submit(score_job, seed, name, unit, out) for seed in range(seeds) for name in names]
        for job in track(scoring, "scoring heads"):
            job.result()
        for job in [pool.submit(mixed_job, seed, out) for seed in range(seeds)]:
            job.result()
        judging = [
            pool.submit(job, seed, domain, count, out)
            for job in (default_job, judge_job)
            for seed in range(seeds)
            for domain in DOMAINS
        ]
        for job in track(judging, "judging masks"):
            job.result()


if __name__ == "__main__":
    main()
