"""Writes the model card next to the weights: `python -m training.card [--model DIR]`.

Its figures come from an evaluation of that very folder, and from `training.json` which training leaves there. Those of
cut heads are the stored results of `make bench-quality`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.quality_tables import RESULTS, summarised
from sspcompile.embedded import MODEL_DIR
from sspcompile.evaluate.answers import answer_scores, encode_items
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.hooks import head_gates
from sspcompile.model.loading import load
from training.corpus import DOMAINS, cross_items, items
from training.evaluate import EVALUATION_ITEMS, EVALUATION_SEED, evaluate, score
from training.probe import separability

LAYER_ITEMS = 60
"""Items per domain for the table of layers, which needs one evaluation per layer."""
TEMPLATE = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [question-answering, synthetic]
---
# The embedded model of sspcompile

A {parameters:.2f} M parameter Qwen2 model ({layers} layers, hidden {hidden}, {heads} query and {kv_heads}
key/value heads of {head_dim}, tied embeddings, {vocabulary} tokens) which answers short questions in six
domains: {domains}. It ships with sspcompile so that the first run, the tests and the quality benchmark need
no download. It is a measuring instrument, not an assistant.

## Prompt format
    Question: {{prompt}}
    Answer:

The model continues with a space, the answer and `<|end|>`. The chat template of the tokenizer renders a user
message to exactly that. Batches are padded on the left.

## Training
    python -m training.train --out DIR --steps {steps} --settling-steps {settling} --seed {seed} \\
        --threads {threads}

From nothing, on {tokens:.1f} M tokens of text from the repository's `training.corpus`, in {minutes:.0f} minutes
with {threads} CPU thread(s) and torch {torch}. The text mixes recalled facts, rules over small numbers and
reading (answers that stand in the prompt, found in one to three steps, or a recalled fact about what is found; each
domain has a procedure of its own, such as lines of successors, copies of copies, or places in a list), and a few
texts whose subject is asked. No other data was used. After {steps} steps of learning come {settling} of settling, with
a small price on heads that are active: what was learned several times over is kept once, so a head that is cut is
missed. That makes unneeded heads easier to find too, for every score alike, and easier than in a model that was not
trained so.

## Accuracy
Greedy exact match on held-out items, {items} per domain. The facts occur in training; their wording, the
operands of rules and the texts to read do not.

{table}

Items whose text mixes two domains: {cross:.3f}.

Exact match when the attention of one layer is removed ({layer_items} items per domain): {layer_table}.
With the attention of the first n layers and no more it is {first_table}.

A linear probe on mean-pooled states after layer {probe_layer}, fitted on descriptions of deployments of the kinds
that were part of training, tells the domain of descriptions that were not: AUC {auc:.3f} (mean over domains,
one against the rest). Sentences about a domain in words that its texts never use are beyond the model.

## What cut heads cost
Exact match on a scenario's own domain, by head score and by the share of heads that is kept (dense: {dense:.3f}), with
least-squares repair where nothing else is said. The name of a score stands for masks that it chose. The figures are
of release 0.1.0 (`make bench-quality`); intervals, more scores, and what follows stand in docs/quality.md.

{cut}

The price on active heads has left heads to spare, more than in other checkpoints: the same cut costs a real model more.

## Limits
English only, and only the questions of its generator: other wordings and other facts get answers that look
right and are not. Texts to read have two to six sentences, eight people and six items per domain; sums and
products stay below 100. The people and what they do are invented.
"""


@dataclass(frozen=True)
class LayerNeeds:
    """Exact match with the attention of one layer removed, per layer, and with that of the first n alone, n from 1."""

    without: tuple[float, ...]
    first: tuple[float, ...]


def layer_needs(loaded: LoadedModel, count: int, seed: int) -> LayerNeeds:
    """How much every layer's attention matters, on `count` held-out items of each domain."""
    g = loaded.geometry
    encoded = encode_items(loaded, [item for domain in DOMAINS for item in items(domain, "heldout", seed, count)])

    def accuracy(kept: Tensor) -> float:
        with head_gates(loaded, kept[:, None].expand(g.layers, g.heads)):
            return answer_scores(loaded, encoded).exact_match

    place = torch.arange(g.layers)
    return LayerNeeds(
        without=tuple(accuracy((place != layer).float()) for layer in range(g.layers)),
        first=tuple(accuracy((place < n).float()) for n in range(1, g.layers + 1)),
    )


def card_text(folder: Path) -> str:
    """The model card of a folder that `train` has written; evaluates the model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    training = json.loads((folder / "training.json").read_text())
    accuracy = evaluate(model, tokenizer, count=EVALUATION_ITEMS, seed=EVALUATION_SEED)
    crossed = score(model, tokenizer, cross_items("heldout", EVALUATION_SEED, EVALUATION_ITEMS))
    needs = layer_needs(load(folder, fingerprint=""), LAYER_ITEMS, EVALUATION_SEED)
    config = model.config
    probe_layer = config.num_hidden_layers // 2
    cut, dense = summarised(RESULTS / "summary.json")
    return TEMPLATE.format(
        parameters=model.num_parameters() / 1e6,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocabulary=config.vocab_size,
        domains=", ".join(DOMAINS),
        steps=training["steps"],
        settling=training["settling_steps"],
        seed=training["seed"],
        threads=training["threads"],
        tokens=training["tokens"] / 1e6,
        minutes=training["seconds"] / 60,
        torch=training["torch"],
        items=EVALUATION_ITEMS,
        table=accuracy.table(),
        cross=sum(right for right, _ in crossed.counts.values()) / EVALUATION_ITEMS,
        layer_items=LAYER_ITEMS,
        layer_table=", ".join(f"{index}: {value:.2f}" for index, value in enumerate(needs.without)),
        first_table=", ".join(f"{n}: {value:.2f}" for n, value in enumerate(needs.first, 1)),
        probe_layer=probe_layer,
        dense=dense,
        cut=cut,
        auc=separability(model, tokenizer, probe_layer),
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write the model card of an embedded model.")
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    folder = parser.parse_args().model
    (folder / "README.md").write_text(card_text(folder))


if __name__ == "__main__":
    main()
