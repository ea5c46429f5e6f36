"""Trains the embedded model from nothing: `python -m sspcompile.embedded.train --out DIR`.

Four stages, each a richer diet: look-ups in one domain, look-ups in all, everything that reads, everything. Reading
does not start by itself; what starts it is this ladder, the throw-away losses of `auxiliary` and an initialisation in
which heads already match equal tokens. The same seed and number of threads on the same machine give the same weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from sspcompile.embedded.auxiliary import Echo, Hop, Lookback, link_tokens, name_tokens
from sspcompile.embedded.corpus import DOMAINS
from sspcompile.embedded.corpus.stories import READING_TASKS
from sspcompile.embedded.documents import Diet, Document, DocumentStream
from sspcompile.embedded.evaluate import evaluate
from sspcompile.embedded.handwritten import training_descriptions
from sspcompile.embedded.muon import Muon
from sspcompile.embedded.network import build_model, hidden_states
from sspcompile.embedded.store import save_model
from sspcompile.embedded.tokenizer import build_tokenizer

STEPS = 6800
BATCH = 32
BUCKET_BATCHES = 16
MUON_RATE, MUON_MOMENTUM, MUON_DECAY = 0.015, 0.95, 0.05
ADAM_RATE, ADAM_BETAS = 3e-3, (0.9, 0.95)
WARM_UP_STEPS = 50
DECAY_SHARE = 0.5
"""The last share of the steps, in which both learning rates fall to zero."""
LOOKBACK_LAYER, ECHO_LAYER, HOP_LAYER = 1, 3, 5
AUXILIARY_WEIGHT = 0.5
AUXILIARY_SHARE = 0.45
"""The share of the steps after which the throw-away losses are gone; their weight falls linearly."""
SAMPLED_POSITIONS = 0.1
LANGUAGE_WEIGHT = 0.05
"""Weight of next-token prediction at the sampled positions, so that questions are modelled too."""
CLIP = 1.0
SMOOTHING = 0.95
REPORT_EVERY, CHECK_EVERY = 50, 500
CHECK_ITEMS, CHECK_SEED = 60, 1


@dataclass(frozen=True)
class Stage:
    """A diet, and the smoothed loss on answers below which the next stage begins."""

    diet: Diet
    passed_at: float


_FIRST = Diet(("chemistry",), ("read-near", "read-far"), ("word",), shortened=1.0, scenes=1.0, descriptions=0.0)
_NEAR = replace(_FIRST, domains=DOMAINS, tasks=("read-near",), shortened=0.5)
LADDER: tuple[Stage, ...] = (
    Stage(_FIRST, 0.12),
    Stage(_NEAR, 0.25),
    Stage(replace(_NEAR, tasks=READING_TASKS, forms=("word", "word", "number"), shortened=0.2), 0.3),
    Stage(Diet(), 0.0),
)
LADDER_PATIENCE = 60
"""Steps that a stage takes at least, so that the smoothed loss is its own."""
LADDER_SHARE = 0.3
"""The share of the steps by which the last stage begins in any case."""


def learning_rate_scale(step: int, steps: int) -> float:
    """Warm-up, constant, then linear to zero; a share of the full rate."""
    return min(1.0, (step + 1) / WARM_UP_STEPS, (steps - step) / (steps * DECAY_SHARE))


def batches(stream: DocumentStream, pad: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and loss weights, each [BATCH, length], of documents with about the same length."""
    order = Random(f"batches/{seed}")
    while True:
        diet = stream.diet
        drawn = sorted((stream.draw() for _ in range(BATCH * BUCKET_BATCHES)), key=lambda one: len(one.ids))
        groups = [drawn[start : start + BATCH] for start in range(0, len(drawn), BATCH)]
        order.shuffle(groups)
        for group in groups:
            yield _padded(group, pad)
            if stream.diet is not diet:
                break


def _padded(group: list[Document], pad: int) -> tuple[Tensor, Tensor]:
    length = max(len(one.ids) for one in group)
    tokens = torch.tensor([one.ids + [pad] * (length - len(one.ids)) for one in group])
    weights = torch.tensor([one.weights + [0.0] * (length - len(one.weights)) for one in group])
    return tokens, weights


class Objective(nn.Module):
    """The training loss and its throw-away parts."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        super().__init__()
        names = name_tokens(tokenizer)
        self.lookback, self.echo, self.hop = Lookback(), Echo(names), Hop(names, link_tokens(tokenizer))
        self._pad = tokenizer.pad_token_id
        self._chooser = torch.Generator().manual_seed(seed)

    def forward(
        self, model: Qwen2ForCausalLM, tokens: Tensor, weights: Tensor, auxiliary: float
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of a batch, and the values of its parts; `auxiliary` weighs the throw-away ones."""
        inputs, targets, weights = tokens[:, :-1], tokens[:, 1:], weights[:, 1:]
        states, last = hidden_states(model, inputs)
        embedding = model.model.embed_tokens.weight
        asked = weights > 0
        per_token = F.cross_entropy(last[asked] @ embedding.T, targets[asked], reduction="none")
        answers = (per_token * weights[asked]).sum() / weights[asked].sum()
        drawn = torch.rand(targets.shape, generator=self._chooser).to(tokens.device)
        chosen = (drawn < SAMPLED_POSITIONS) & (targets != self._pad)
        language = F.cross_entropy(last[chosen] @ embedding.T, targets[chosen])
        loss = answers + LANGUAGE_WEIGHT * language
        parts = {"loss": answers.item(), "language": language.item()}
        if auxiliary > 0:
            back = self.lookback(states[LOOKBACK_LAYER], inputs, chosen, embedding)
            around = self.echo(states[ECHO_LAYER], inputs, embedding)
            twice = self.hop(states[HOP_LAYER], inputs, embedding)
            loss = loss + auxiliary * (back + around + twice)
            parts |= {"look-back": back.item(), "echo": around.item(), "hop": twice.item()}
        return loss, parts


class Ladder:
    """Which stage feeds the next step."""

    def __init__(self, steps: int) -> None:
        self._last_call = LADDER_SHARE * steps
        self._stage, self._entered = 0, 0

    def diet(self, step: int, smoothed: float) -> Diet:
        """The diet of this step, given the smoothed loss of the steps before."""
        if step - self._entered > LADDER_PATIENCE and smoothed < LADDER[self._stage].passed_at:
            self._stage, self._entered = self._stage + 1, step
            print(f"step {step} stage {self._stage}", file=sys.stderr, flush=True)
        elif step >= self._last_call and self._stage < len(LADDER) - 1:
            self._stage, self._entered = len(LADDER) - 1, step
        return LADDER[self._stage].diet


def train(out: Path, *, steps: int, threads: int, seed: int, device: str) -> None:
    """Trains and keeps the state so far in `out`, every few hundred steps and at the end."""
    # Probabilities near zero become denormal numbers, which slow a CPU down by an order of magnitude. The setting
    # belongs to a thread and is inherited, so it comes before the workers start.
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    tokenizer = build_tokenizer(text for text, _ in training_descriptions())
    model = build_model(tokenizer, seed).to(device)
    objective = Objective(tokenizer, seed).to(device)
    named = list(model.named_parameters())
    matrices = [parameter for name, parameter in named if parameter.ndim == 2 and "embed" not in name]
    others = [parameter for name, parameter in named if parameter.ndim != 2 or "embed" in name]
    muon = Muon(matrices, MUON_RATE, MUON_MOMENTUM, MUON_DECAY)
    adam = torch.optim.AdamW([*others, *objective.parameters()], lr=ADAM_RATE, betas=ADAM_BETAS, weight_decay=0.0)
    ladder = Ladder(steps)
    # Tokens of later stages would drift together: as wrong answers they all get the same small gradient, which Adam
    # scales to full steps. They stay where they began until they occur.
    known = torch.zeros(len(tokenizer), dtype=torch.bool, device=device)
    stream = DocumentStream(tokenizer, training_descriptions(), seed, LADDER[0].diet)
    data = batches(stream, tokenizer.pad_token_id, seed)
    started, seen, smoothed = time.monotonic(), 0, 0.0
    for step in range(steps):
        stream.diet = ladder.diet(step, smoothed)
        tokens, weights = next(data)
        seen += tokens.numel()
        auxiliary = AUXILIARY_WEIGHT * max(0.0, 1.0 - step / (AUXILIARY_SHARE * steps))
        loss, parts = objective(model, tokens.to(device), weights.to(device), auxiliary)
        loss.backward()
        known[tokens] = True
        model.model.embed_tokens.weight.grad[~known] = 0.0
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        scale = learning_rate_scale(step, steps)
        muon.learning_rate = MUON_RATE * scale
        adam.param_groups[0]["lr"] = ADAM_RATE * scale
        muon.step()
        adam.step()
        model.zero_grad(set_to_none=True)
        objective.zero_grad(set_to_none=True)
        smoothed = parts["loss"] if step == 0 else SMOOTHING * smoothed + (1 - SMOOTHING) * parts["loss"]
        seconds, last = time.monotonic() - started, step == steps - 1
        if step % REPORT_EVERY == 0 or last:
            values = " ".join(f"{name} {value:.3f}" for name, value in (parts | {"loss": smoothed}).items())
            print(f"step {step} {values} tokens {seen} {seen / seconds:.0f}/s {seconds:.0f}s", file=sys.stderr)
        if (step and step % CHECK_EVERY == 0) or last:
            accuracy = evaluate(model, tokenizer, count=CHECK_ITEMS, seed=CHECK_SEED)
            print(accuracy.table(), file=sys.stderr, flush=True)
            save_model(model, tokenizer, out)
            record = {"steps": steps, "finished_steps": step + 1, "tokens": seen, "seconds": round(seconds)}
            record |= {"seed": seed, "threads": threads, "device": device, "torch": torch.__version__}
            (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    train(options.out, steps=options.steps, threads=options.threads, seed=options.seed, device=options.device)


if __name__ == "__main__":
    main()
