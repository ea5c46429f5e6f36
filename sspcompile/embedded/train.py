"""Trains the embedded model from nothing: `python -m sspcompile.embedded.train --out DIR`.

Three stages, each a richer diet: look-ups in one domain, look-ups in all, everything. Reading does not start by itself;
what starts it is the first stages together with a throw-away loss which asks the middle layer for the tokens 1, 2 and 3
places back. The same seed and number of threads on the same machine give the same weights.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sspcompile.embedded.corpus import DOMAINS
from sspcompile.embedded.documents import LOOK_UPS, Diet, Document, DocumentStream
from sspcompile.embedded.evaluate import Accuracy, evaluate
from sspcompile.embedded.handwritten import training_descriptions
from sspcompile.embedded.muon import Muon
from sspcompile.embedded.network import HIDDEN, build_model, hidden_states
from sspcompile.embedded.store import save_model
from sspcompile.embedded.tokenizer import build_tokenizer

STEPS = 7000
BATCH = 32
BUCKET_BATCHES = 16
MUON_RATE, MUON_MOMENTUM, MUON_DECAY = 0.02, 0.95, 0.01
ADAM_RATE, ADAM_BETAS = 3e-3, (0.9, 0.95)
WARM_UP_STEPS = 50
DECAY_SHARE = 0.4
"""The last share of the steps, in which both learning rates fall to zero."""
LOOKBACK = (1, 2, 3)
LOOKBACK_LAYER = 3
LOOKBACK_WEIGHT = 0.5
LOOKBACK_SHARE = 0.25
"""The share of the steps after which the look-back loss is gone; it falls linearly."""
SAMPLED_POSITIONS = 0.12
LANGUAGE_WEIGHT = 0.05
"""Weight of next-token prediction at the sampled positions, so that questions are modelled too."""
CLIP = 1.0
REPORT_EVERY, CHECK_EVERY = 50, 500
CHECK_ITEMS = 60


@dataclass(frozen=True)
class Stage:
    """A diet and the step after which it ends, as a share of all steps."""

    until: float
    diet: Diet


LADDER: tuple[Stage, ...] = (
    Stage(0.06, Diet(("chemistry",), LOOK_UPS, ("word", "number"), scenes=1.0, descriptions=0.0)),
    Stage(0.16, Diet(DOMAINS, LOOK_UPS, ("word", "number"), scenes=1.0, descriptions=0.0)),
    Stage(1.0, Diet()),
)


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


class Lookback(nn.Module):
    """The throw-away heads: linear maps from a middle layer, read through the tied output matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in LOOKBACK)

    def forward(self, state: Tensor, tokens: Tensor, chosen: Tensor, embedding: Tensor) -> Tensor:
        """Mean loss at the chosen positions [rows, length] for all distances."""
        losses = []
        for distance, linear in zip(LOOKBACK, self.maps, strict=True):
            picked = chosen[:, distance:]
            source = F.rms_norm(state[:, distance:][picked], (HIDDEN,))
            losses.append(F.cross_entropy(linear(source) @ embedding.T, tokens[:, :-distance][picked]))
        return torch.stack(losses).mean()


def train(out: Path, *, steps: int, threads: int, seed: int, device: str) -> Accuracy:
    """Trains, keeps the state so far in `out` and returns the final accuracy on held-out items."""
    # Probabilities near zero become denormal numbers, which slow a CPU down by an order of magnitude. The setting
    # belongs to a thread and is inherited, so it comes before the workers start.
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    tokenizer = build_tokenizer(text for text, _ in training_descriptions())
    model = build_model(tokenizer, seed).to(device)
    lookback = Lookback().to(device)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = Muon(matrices, MUON_RATE, MUON_MOMENTUM, MUON_DECAY)
    adam = torch.optim.AdamW([*others, *lookback.parameters()], lr=ADAM_RATE, betas=ADAM_BETAS, weight_decay=0.0)
    stream = DocumentStream(tokenizer, training_descriptions(), seed, LADDER[0].diet)
    chooser = torch.Generator().manual_seed(seed)
    data = batches(stream, tokenizer.pad_token_id, seed)
    started, seen, smoothed = time.monotonic(), 0, 0.0
    accuracy = Accuracy({})
    for step in range(steps):
        stream.diet = next(stage.diet for stage in LADDER if step < stage.until * steps or stage is LADDER[-1])
        tokens, weights = next(data)
        seen += tokens.numel()
        tokens, weights = tokens.to(device), weights.to(device)
        states, last = hidden_states(model, tokens[:, :-1])
        embedding = model.model.embed_tokens.weight
        asked = weights[:, 1:] > 0
        answers = F.cross_entropy(last[asked] @ embedding.T, tokens[:, 1:][asked], reduction="none")
        answer_weights = weights[:, 1:][asked]
        loss = answer_loss = (answers * answer_weights).sum() / answer_weights.sum()
        real = tokens[:, 1:] != tokenizer.pad_token_id
        chosen = (torch.rand(real.shape, generator=chooser).to(device) < SAMPLED_POSITIONS) & real
        language = F.cross_entropy(last[chosen] @ embedding.T, tokens[:, 1:][chosen])
        loss = loss + LANGUAGE_WEIGHT * language
        fading = 1.0 - step / (LOOKBACK_SHARE * steps)
        if fading > 0:
            loss = loss + LOOKBACK_WEIGHT * fading * lookback(states[LOOKBACK_LAYER], tokens[:, :-1], chosen, embedding)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        scale = learning_rate_scale(step, steps)
        muon.learning_rate = MUON_RATE * scale
        adam.param_groups[0]["lr"] = ADAM_RATE * scale
        muon.step()
        adam.step()
        model.zero_grad(set_to_none=True)
        lookback.zero_grad(set_to_none=True)
        smoothed = answer_loss.item() if step == 0 else 0.97 * smoothed + 0.03 * answer_loss.item()
        if step % REPORT_EVERY == 0 or step == steps - 1:
            spent = time.monotonic() - started
            print(
                f"step {step} loss {smoothed:.3f} language {language.item():.2f} tokens {seen / 1e6:.2f}M "
                f"{seen / spent:.0f}/s {spent:.0f}s",
                file=sys.stderr,
                flush=True,
            )
        if (step and step % CHECK_EVERY == 0) or step == steps - 1:
            accuracy = evaluate(model, tokenizer, count=CHECK_ITEMS, seed=1)
            print(accuracy.table(), file=sys.stderr, flush=True)
            save_model(model, tokenizer, out)
    return accuracy


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    train(options.out, steps=options.steps, threads=options.threads, seed=options.seed, device=options.device)


if __name__ == "__main__":
    main()
