"""Trains the embedded model from nothing: `python -m sspcompile.embedded.train --out DIR`.

Three stages, each a richer diet: look-ups in one domain, look-ups in all, everything. Reading does not start by itself;
what starts it is the first stages together with a throw-away loss which asks the middle layer for the tokens 1 to 6
places back. The same seed and number of threads on the same machine give the same weights.
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
from transformers import PreTrainedTokenizerFast

from sspcompile.embedded.corpus import DOMAIN_DATA, DOMAINS
from sspcompile.embedded.documents import LOOK_UPS, Diet, Document, DocumentStream
from sspcompile.embedded.evaluate import Accuracy, evaluate
from sspcompile.embedded.handwritten import training_descriptions
from sspcompile.embedded.muon import Muon
from sspcompile.embedded.network import HIDDEN, build_model, hidden_states
from sspcompile.embedded.store import save_model
from sspcompile.embedded.tokenizer import build_tokenizer

STEPS = 4200
BATCH = 32
BUCKET_BATCHES = 16
MUON_RATE, MUON_MOMENTUM, MUON_DECAY = 0.02, 0.95, 0.01
ADAM_RATE, ADAM_BETAS = 3e-3, (0.9, 0.95)
WARM_UP_STEPS = 50
DECAY_SHARE = 0.5
"""The last share of the steps, in which both learning rates fall to zero."""
LOOKBACK = (1, 2, 3, 4, 5)
LOOKBACK_LAYER = 2
ECHO = (-4, -2, 2, 4)
ECHO_LAYER = 4
ECHO_POSITIONS = 160
LOOKBACK_WEIGHT = 0.5
LOOKBACK_SHARE = 0.25
"""The share of the steps after which the look-back loss is gone; it falls linearly."""
SAMPLED_POSITIONS = 0.1
LANGUAGE_WEIGHT = 0.05
"""Weight of next-token prediction at the sampled positions, so that questions are modelled too."""
CLIP = 1.0
REPORT_EVERY, CHECK_EVERY = 50, 500
CHECK_ITEMS = 60


@dataclass(frozen=True)
class Stage:
    """A diet, and the smoothed loss on answers below which the next stage begins."""

    diet: Diet
    passed_at: float


_FIRST = Diet(
    ("chemistry",), ("read-item", "read-owner"), ("word",), pool=6, shortened=1.0, scenes=1.0, descriptions=0.0
)
LADDER: tuple[Stage, ...] = (
    Stage(_FIRST, 0.12),
    Stage(replace(_FIRST, tasks=LOOK_UPS, forms=("word", "number"), pool=8, shortened=0.5), 0.25),
    Stage(replace(_FIRST, domains=DOMAINS, tasks=LOOK_UPS, forms=("word", "number"), pool=None, shortened=0.2), 0.3),
    Stage(Diet(), 0.0),
)
LADDER_PATIENCE = 60
"""Steps that a stage takes at least, so that the smoothed loss is its own."""
LADDER_SHARE = 0.2
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


class Lookback(nn.Module):
    """Throw-away heads: linear maps from an early layer, read through the tied output matrix.

    They ask for the tokens that stand a few places before each chosen position.
    """

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


class Echo(nn.Module):
    """Throw-away heads: for a token that occurred once before, what stood around it then.

    This is what reading needs (who is asked about, and what the text said near that name), asked directly and at many
    positions.
    """

    def __init__(self, names: Tensor) -> None:
        """`names` [vocabulary] is true for tokens that end an owner's or an item's name."""
        super().__init__()
        self.names = names
        self.maps = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in ECHO)

    def forward(self, state: Tensor, tokens: Tensor, embedding: Tensor) -> Tensor:
        """Mean loss over all places around the earlier occurrence, at the second occurrence of each token."""
        length = tokens.shape[1]
        same = (tokens.unsqueeze(2) == tokens.unsqueeze(1)).tril(-1)  # [rows, length, length]
        row, here = ((same.sum(2) == 1) & self.names[tokens]).nonzero(as_tuple=True)
        row, here = row[:ECHO_POSITIONS], here[:ECHO_POSITIONS]
        before = same[row, here].int().argmax(1)
        source = F.rms_norm(state[row, here], (HIDDEN,))
        losses = []
        for offset, linear in zip(ECHO, self.maps, strict=True):
            place = before + offset
            valid = (place >= 0) & (place < here) & (tokens[row, here] != tokens[row, place.clamp(0, length - 1)])
            logits = linear(source[valid]) @ embedding.T
            losses.append(F.cross_entropy(logits, tokens[row[valid], place[valid]]))
        return torch.stack(losses).mean()


def name_tokens(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """True for the last token of every owner and item, [vocabulary]."""
    names = torch.zeros(len(tokenizer), dtype=torch.bool)
    for domain in DOMAINS:
        data = DOMAIN_DATA[domain]
        for name in (*data.scene.owners, *data.first.facts):
            names[tokenizer.encode(f" {name}")[-1]] = True
    return names


def train(out: Path, *, steps: int, threads: int, seed: int, device: str) -> Accuracy:
    """Trains, keeps the state so far in `out` and returns the final accuracy on held-out items."""
    # Probabilities near zero become denormal numbers, which slow a CPU down by an order of magnitude. The setting
    # belongs to a thread and is inherited, so it comes before the workers start.
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    tokenizer = build_tokenizer(text for text, _ in training_descriptions())
    model = build_model(tokenizer, seed).to(device)
    lookback, echo = Lookback().to(device), Echo(name_tokens(tokenizer)).to(device)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = Muon(matrices, MUON_RATE, MUON_MOMENTUM, MUON_DECAY)
    adam = torch.optim.AdamW(
        [*others, *lookback.parameters(), *echo.parameters()], lr=ADAM_RATE, betas=ADAM_BETAS, weight_decay=0.0
    )
    stream = DocumentStream(tokenizer, training_descriptions(), seed, LADDER[0].diet)
    climbed, entered = 0, 0
    chooser = torch.Generator().manual_seed(seed)
    data = batches(stream, tokenizer.pad_token_id, seed)
    started, seen, smoothed = time.monotonic(), 0, 0.0
    accuracy, back, heard = Accuracy({}), torch.zeros(()), torch.zeros(())
    for step in range(steps):
        if step - entered > LADDER_PATIENCE and smoothed < LADDER[climbed].passed_at:
            climbed, entered = climbed + 1, step
            print(f"step {step} stage {climbed}", file=sys.stderr, flush=True)
        elif step >= LADDER_SHARE * steps and climbed < len(LADDER) - 1:
            climbed, entered = len(LADDER) - 1, step
        stream.diet = LADDER[climbed].diet
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
            back = lookback(states[LOOKBACK_LAYER], tokens[:, :-1], chosen, embedding)
            heard = echo(states[ECHO_LAYER], tokens[:, :-1], embedding)
            loss = loss + LOOKBACK_WEIGHT * fading * (back + heard)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        scale = learning_rate_scale(step, steps)
        muon.learning_rate = MUON_RATE * scale
        adam.param_groups[0]["lr"] = ADAM_RATE * scale
        muon.step()
        adam.step()
        model.zero_grad(set_to_none=True)
        adam.zero_grad(set_to_none=True)
        smoothed = answer_loss.item() if step == 0 else 0.95 * smoothed + 0.05 * answer_loss.item()
        if step % REPORT_EVERY == 0 or step == steps - 1:
            spent = time.monotonic() - started
            print(
                f"step {step} loss {smoothed:.3f} look-back {back.item():.2f} echo {heard.item():.2f} "
                f"language {language.item():.2f} tokens {seen / 1e6:.2f}M {seen / spent:.0f}/s {spent:.0f}s",
                file=sys.stderr,
                flush=True,
            )
        if (step and step % CHECK_EVERY == 0) or step == steps - 1:
            accuracy = evaluate(model, tokenizer, count=CHECK_ITEMS, seed=1)
            print(accuracy.table(), file=sys.stderr, flush=True)
            save_model(model, tokenizer, out)
            record = {"steps": steps, "seed": seed, "threads": threads, "device": device, "tokens": seen}
            record |= {"finished_steps": step + 1, "seconds": time.monotonic() - started, "torch": torch.__version__}
            (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
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
