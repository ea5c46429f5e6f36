"""What repairing a mixture with narrower experts is worth: KL of a small one trained here, without and with all of it.

    python -m benchmarks.experts [--families mixtral,qwen3_moe] [--steps 500] [--fit 96] [--widths 0.5,0.75]

The mixture has the tokenizer of the embedded model and learns its questions. For two of their domains the channels of
least Fisher information go from every expert, by FIT texts that fit the repair as well. Held-out questions judge.

What is compared is no repair with the whole one, which refits o_proj in every layer behind the first cut as well as the
experts' down projections: what the latter alone are worth is not told apart.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import sspcompile.embedded
from sspcompile.criteria.curvature import curvature
from sspcompile.criteria.units import CriterionInput
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.loading import load
from sspcompile.model.text import Batch, with_continuations
from sspcompile.repair.fitting import fit_repairs
from sspcompile.repair.repair import Repair, masked
from sspcompile.slicing.mask import Kept
from training.corpus import DOMAINS, items
from training.tokenizer import QUESTION

EMBEDDED = Path(sspcompile.embedded.__file__).parent / "model"
SIZES: Mapping[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 12,
    "initializer_range": 0.03,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
MIXTURES: Mapping[str, Mapping[str, Any]] = {
    "mixtral": {"intermediate_size": 128, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
    },
}
TOGETHER, RATE, WARM = 48, 3e-3, 50
JUDGED, HELD_OUT = ("math", "history"), 96


def trained(family: str, steps: int, folder: Path) -> LoadedModel:
    """A mixture that learned questions of all domains for so many steps of TOGETHER."""
    torch.manual_seed(0)
    draw, tokenizer = random.Random(0), AutoTokenizer.from_pretrained(EMBEDDED)
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **SIZES, **MIXTURES[family])
    model = AutoModelForCausalLM.from_config(config).train()
    asked = [item for domain in DOMAINS for item in items(domain, "train", 0, 1000)]
    texts = [
        (tokenizer(QUESTION.format(prompt=one.prompt)).input_ids, [*tokenizer(" " + one.answer).input_ids, 1])
        for one in asked
    ]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / WARM) * (1 - step / steps)
        ids, labels = _padded(draw.sample(texts, TOGETHER))
        logits = model(input_ids=ids).logits[:, :-1]
        optimizer.zero_grad()
        cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load(folder, fingerprint="")


def _padded(texts: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Ids [texts, T], padded on the right, and labels: those of the answers."""
    longest = max(len(prompt) + len(answer) for prompt, answer in texts)
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(texts):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return ids, labels


@torch.inference_mode()
def divergence(loaded: LoadedModel, batches: Sequence[Batch], kept: Kept, repair: Repair | None) -> float:
    """KL from the dense model in nats, the mean over scored positions."""
    found = []
    for batch in batches:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        dense = loaded.model(**inputs).logits[batch.score_mask].double().log_softmax(-1)
        with masked(loaded, kept, repair):
            cut = loaded.model(**inputs).logits[batch.score_mask].double().log_softmax(-1)
        found.append((dense.exp() * (dense - cut)).sum(-1))
    return float(torch.cat(found).mean())


def rows(loaded: LoadedModel, family: str, fit: int, widths: Sequence[float]) -> Iterator[dict[str, object]]:
    """A row for every domain and width."""
    g = loaded.geometry
    for domain in JUDGED:
        drawn = items(domain, "train", 11, fit), items(domain, "heldout", 5, HELD_OUT)
        texts, held = (with_continuations(loaded, [item.prompt for item in one], 8) for one in drawn)
        scores = curvature(loaded, CriterionInput(texts, fit)).channels
        assert scores is not None
        order = np.argsort(-scores.reshape(g.layers, g.mlps, g.width), -1)
        for width in widths:
            channels = np.zeros(order.shape, dtype=bool)
            np.put_along_axis(channels, order[..., : int(width * g.width)], True, -1)
            kept = Kept(np.ones((g.layers, g.heads), dtype=bool), channels.reshape(g.layers, -1))
            (repair,) = fit_repairs(loaded, [kept], texts, dtype=torch.float32)
            bare, mended = (divergence(loaded, held, kept, one) for one in (None, repair))
            yield {"family": family, "domain": domain, "fit": fit, "width": width, "none": bare, "repaired": mended}


@click.command()
@click.option("--families", default=",".join(MIXTURES), show_default=True)
@click.option("--steps", default=500, show_default=True, help="Of training.")
@click.option("--fit", default=96, show_default=True, help="Texts that score channels and fit the repair.")
@click.option("--widths", default="0.5,0.75", show_default=True, help="Shares of the channels of every expert.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/experts.jsonl"))
def main(families: str, steps: int, fit: int, widths: str, out: Path) -> None:
    """Compare mixtures with narrower experts without a repair and with the whole one, o_proj and experts."""
    with out.open("w", encoding="utf-8") as file:
        for family in families.split(","):
            with TemporaryDirectory() as folder:
                loaded = trained(family, steps, Path(folder))
                for row in rows(loaded, family, fit, [*map(float, widths.split(","))]):
                    file.write(json.dumps(row | {"steps": steps}) + "\n")
                    file.flush()
                    click.echo(json.dumps(row))


if __name__ == "__main__":
    main()
