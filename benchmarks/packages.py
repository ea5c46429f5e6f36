"""Pruners that the package index has, as they are installed, beside a per-layer cut of the same size.

    python -m benchmarks.packages --model SMOLLM2 --data DIR [--scenarios word-problems] [--sizes 0.9,0.8,0.7]

Scenarios, texts and scores are those of `benchmarks.real`: FIT texts choose, JUDGED others judge. optipfair narrows the
MLPs of all layers alike, by the magnitudes of weights (MAW) and with the inputs of FIT texts (MAW, data), or removes
the last layers (DEPTH); it repairs nothing. Ours is the mask by `obs` with its least-squares repair, with whose losses
those of the others are paired.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import optipfair
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.real import Budget, Ground, figures, scored
from sspcompile.model.decoder import LoadedModel, TextModel
from sspcompile.model.dense import open_dense
from sspcompile.model.divergence import Divergence, DivergenceAccumulator, compare_divergences
from sspcompile.model.loading import load_cut
from sspcompile.model.text import Batch, batches_of
from sspcompile.repair.repair import refitted_dtype
from sspcompile.select.judging import HeldOut, references_of
from sspcompile.slicing.sizes import Worth

Prune = Callable[[PreTrainedModel, float, Sequence[Batch]], PreTrainedModel]


def narrowed(model: PreTrainedModel, size: float, batches: Sequence[Batch] | None) -> PreTrainedModel:
    """MLPs of one width that leave `size` of all parameters."""
    channels = sum(p.numel() for name, p in model.named_parameters() if ".mlp." in name)
    gone = 100 * (1 - size) * model.num_parameters() / channels
    texts = None if batches is None else [(one.input_ids, one.attention_mask) for one in batches]
    return optipfair.prune_model(
        model, neuron_selection_method="MAW", pruning_percentage=gone, dataloader=texts, show_progress=False
    )


def shortened(model: PreTrainedModel, size: float) -> PreTrainedModel:
    """Without the last layers, so many that at most `size` of all parameters stay."""
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    gone = -int(-(1 - size) * model.num_parameters() // layer)
    return optipfair.prune_model(model, pruning_type="DEPTH", num_layers_to_remove=gone, show_progress=False)


PRUNERS: Mapping[str, Prune] = {
    "optipfair MAW": lambda model, size, _: narrowed(model, size, None),
    "optipfair MAW, data": narrowed,
    "optipfair DEPTH": lambda model, size, _: shortened(model, size),
}


@torch.inference_mode()
def divergence(dense: LoadedModel, other: TextModel, held: HeldOut) -> Divergence:
    """Of a model in a folder from the dense one, on texts that are held out."""
    collected = DivergenceAccumulator()
    for batch in held.batches:
        owner = torch.tensor(batch.rows)[batch.score_mask.nonzero()[:, 0]]
        read = (batch.input_ids, batch.attention_mask, batch.score_mask)
        logits = dense.scored_logits(*read), other.scored_logits(*read)
        collected.add(*logits, owner, references_of(batch, held.texts))
    return collected.result()


def rows(model: str, ground: Ground, name: str, worth: Worth, size: float) -> Iterator[dict[str, Any]]:
    """What a size costs by our mask, and by every pruner of the packages."""
    loaded, (own, off) = ground.loaded, ground.judged(name)
    ours = Budget("least-squares", "per-layer", None, size)
    choice = ours.choice(worth, loaded.geometry)
    repair = ours.fitted("obs", choice.units, ground, name, refitted_dtype(open_dense(model).checkpoint))
    found = own.divergence(choice.units, repair)
    yield {"pruner": "obs", **figures(found, off.divergence(choice.units, repair))}
    batches = batches_of(loaded, ground.fit(name))
    for pruner, prune in PRUNERS.items():
        whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        with tempfile.TemporaryDirectory() as place:
            cut = prune(whole, size, batches)
            left = cut.num_parameters() / loaded.model.num_parameters()
            cut.save_pretrained(place)
            for file in Path(model).glob("*token*"):
                shutil.copy(file, place)
            other = load_cut(Path(place))
            theirs = divergence(loaded, other, own)
            gap = compare_divergences(theirs, found)
            told = figures(theirs, divergence(loaded, other, off))
            yield {"pruner": pruner, "parameters": left, **told, "kl_above_obs": [gap.value, gap.low, gap.high]}


@click.command()
@click.option("--model", required=True, help="A model folder.")
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--scenarios", default="word-problems", show_default=True)
@click.option("--sizes", default="0.9,0.8,0.7", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/packages.jsonl"))
def main(model: str, data: Path, scenarios: str, sizes: str, out: Path) -> None:
    """Compare with packages."""
    ground = Ground(open_dense(model).load(), data, 0)
    for name in scenarios.split(","):
        _, worth, _ = next(iter(scored(ground, name, 0, ())))
        for size in map(float, sizes.split(",")):
            for row in rows(model, ground, name, worth, size):
                line = json.dumps({"optipfair": optipfair.__version__, "scenario": name, "size": size} | row)
                with out.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
                click.echo(line)


if __name__ == "__main__":
    main()
