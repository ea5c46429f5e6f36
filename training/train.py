"""Trains the embedded model from nothing: `python -m training.train --out DIR`.

It learns in four stages, each a richer diet: look-ups in one domain, look-ups in all, everything that reads,
everything. Reading does not start by itself; what starts it is this ladder, the throw-away losses of `auxiliary` and an
initialisation in which heads already match equal tokens. Then it settles: everything, with a price on active heads.
The same seed and number of threads on the same machine give the same weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from training.auxiliary import Echo, Hop, Lookback, link_tokens, name_tokens
from training.corpus import DOMAINS
from training.corpus.stories import READING_TASKS
from training.documents import Diet, Document, DocumentStream
from training.evaluate import evaluate
from training.handwritten import training_descriptions
from training.muon import Muon
from training.network import build_model, hidden_states
from training.store import save_model
from training.tokenizer import build_tokenizer

BATCH = 32
BUCKET_BATCHES = 16
MUON_MOMENTUM, MUON_DECAY = 0.95, 0.05
ADAM_BETAS = (0.9, 0.95)
WARM_UP_STEPS = 50
LOOKBACK_LAYER, ECHO_LAYER, HOP_LAYERS = 1, 3, {2: 5, 3: 6}
AUXILIARY_SHARE = 0.45
"""The share of the steps of learning after which the throw-away losses are gone; their weight falls linearly."""
SAMPLED_POSITIONS = 0.1
LANGUAGE_WEIGHT = 0.05
"""Weight of next-token prediction at the sampled positions, so that questions are modelled too."""
CLIP = 1.0
SMOOTHING = 0.95
REPORT_EVERY, CHECK_EVERY = 50, 500
CHECK_ITEMS, CHECK_SEED = 60, 1
RECORD = "training.json"
LEARNED, SETTLED = "learned", "settled"


@dataclass(frozen=True)
class Phase:
    """Steps with one objective and optimisers of its own: peak rates of Muon and Adam, the last share of the steps in
    which they fall to zero, the first weight of the throw-away losses, and what is charged for active heads.
    """

    steps: int
    muon_rate: float
    adam_rate: float
    decay_share: float
    auxiliary: float = 0.0
    price: float = 0.0


LEARN = Phase(steps=5000, muon_rate=0.015, adam_rate=3e-3, decay_share=0.3, auxiliary=0.5)
SETTLE = Phase(steps=3000, muon_rate=0.006, adam_rate=1e-3, decay_share=0.5, price=0.003)
"""What is learned is learned several times, by layers that stand in for one another. A price on active heads leaves
what is needed, so that a head that is cut is missed; it grows faster than their number in a layer, so that no layer
bears all of it.
"""


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


def learning_rate_scale(step: int, phase: Phase) -> float:
    """Warm-up, constant, then linear to zero; a share of the full rate."""
    return min(1.0, (step + 1) / WARM_UP_STEPS, (phase.steps - step) / (phase.steps * phase.decay_share))


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
        self.lookback, self.echo = Lookback(), Echo(names)
        self.hops = nn.ModuleList(Hop(names, link_tokens(tokenizer), steps) for steps in HOP_LAYERS)
        self._pad = tokenizer.pad_token_id
        self._chooser = torch.Generator().manual_seed(seed)

    def forward(
        self, model: Qwen2ForCausalLM, tokens: Tensor, weights: Tensor, auxiliary: float, price: float
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of a batch, and the values of its parts; `auxiliary` weighs the throw-away ones."""
        inputs, targets, weights = tokens[:, :-1], tokens[:, 1:], weights[:, 1:]
        states, last, activity = hidden_states(model, inputs, real=inputs != self._pad if price else None)
        embedding = model.model.embed_tokens.weight
        asked = weights > 0
        per_token = F.cross_entropy(last[asked] @ embedding.T, targets[asked], reduction="none")
        answers = (per_token * weights[asked]).sum() / weights[asked].sum()
        drawn = torch.rand(targets.shape, generator=self._chooser).to(tokens.device)
        chosen = (drawn < SAMPLED_POSITIONS) & (targets != self._pad)
        language = F.cross_entropy(last[chosen] @ embedding.T, targets[chosen])
        loss = answers + LANGUAGE_WEIGHT * language + price * activity
        parts = {"loss": answers.item(), "language": language.item(), "activity": activity.item()}
        if auxiliary > 0:
            back = self.lookback(states[LOOKBACK_LAYER], inputs, chosen, embedding)
            around = self.echo(states[ECHO_LAYER], inputs, embedding)
            far = [hop(states[HOP_LAYERS[hop.steps]], inputs, embedding) for hop in self.hops]
            loss = loss + auxiliary * (back + around + sum(far))
            parts |= {"look-back": back.item(), "echo": around.item()}
            parts |= {f"hop-{hop.steps}": found.item() for hop, found in zip(self.hops, far, strict=True)}
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


class Log:
    """Progress on stderr, and the model with what is known of its training in a folder."""

    def __init__(self, out: Path, tokenizer: PreTrainedTokenizerFast, facts: dict[str, object]) -> None:
        self.facts: dict[str, object] = {"tokens": 0, "seconds": 0, "finished_steps": 0} | facts
        self._out, self._tokenizer = out, tokenizer
        self._began = time.monotonic()

    def step(self, step: int, parts: dict[str, float], tokens: int) -> None:
        """Count a step; now and then print it."""
        self.facts["tokens"] += tokens
        if step % REPORT_EVERY == 0:
            values = " ".join(f"{name} {value:.3f}" for name, value in parts.items())
            print(f"step {step} {values} tokens {self.facts['tokens']}", file=sys.stderr, flush=True)

    def keep(self, model: Qwen2ForCausalLM, finished: str = "") -> None:
        """Print how the model answers, and save it; `finished` names a phase that is over."""
        print(evaluate(model, self._tokenizer, count=CHECK_ITEMS, seed=CHECK_SEED).table(), file=sys.stderr, flush=True)
        now = time.monotonic()
        self.facts["seconds"] += round(now - self._began)
        self._began = now
        if finished:
            self.facts["finished"] = finished
        save_model(model, self._tokenizer, self._out)
        (self._out / RECORD).write_text(json.dumps(self.facts, indent=2) + "\n")


def run(
    phase: Phase,
    model: Qwen2ForCausalLM,
    objective: Objective,
    feed: Callable[[int, float], tuple[Tensor, Tensor]],
    log: Log,
) -> None:
    """All steps of a phase; `feed` gives the batch of a step, from its number and the smoothed loss."""
    device = model.device
    named = list(model.named_parameters())
    matrices = [parameter for name, parameter in named if parameter.ndim == 2 and "embed" not in name]
    others = [parameter for name, parameter in named if parameter.ndim != 2 or "embed" in name]
    muon = Muon(matrices, phase.muon_rate, MUON_MOMENTUM, MUON_DECAY)
    adam = torch.optim.AdamW([*others, *objective.parameters()], lr=phase.adam_rate, betas=ADAM_BETAS, weight_decay=0.0)
    # Tokens of later stages would drift together: as wrong answers they all get the same small gradient, which Adam
    # scales to full steps. They stay where they began until they occur.
    known = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=device)
    smoothed = 0.0
    for step in range(phase.steps):
        tokens, weights = feed(step, smoothed)
        auxiliary = phase.auxiliary * max(0.0, 1.0 - step / (AUXILIARY_SHARE * phase.steps))
        loss, parts = objective(model, tokens.to(device), weights.to(device), auxiliary, phase.price)
        loss.backward()
        known[tokens] = True
        model.model.embed_tokens.weight.grad[~known] = 0.0
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        scale = learning_rate_scale(step, phase)
        muon.learning_rate = phase.muon_rate * scale
        adam.param_groups[0]["lr"] = phase.adam_rate * scale
        muon.step()
        adam.step()
        model.zero_grad(set_to_none=True)
        objective.zero_grad(set_to_none=True)
        smoothed = parts["loss"] if step == 0 else SMOOTHING * smoothed + (1 - SMOOTHING) * parts["loss"]
        log.facts["finished_steps"] += 1
        log.step(step, parts | {"loss": smoothed}, tokens.numel())
        if step and step % CHECK_EVERY == 0:
            log.keep(model)


def train(out: Path, *, learn: Phase, settle: Phase, threads: int, seed: int, device: str) -> None:
    """Trains and keeps the state so far in `out`, every few hundred steps and at the end.

    Where `out` holds a model that has learned with the same seed, only settling is left.
    """
    # Probabilities near zero become denormal numbers, which slow a CPU down by an order of magnitude. The setting
    # belongs to a thread and is inherited, so it comes before the workers start.
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    tokenizer = build_tokenizer(text for text, _ in training_descriptions())
    facts = {
        "steps": learn.steps,
        "settling_steps": settle.steps,
        "seed": seed,
        "threads": threads,
        "device": device,
        "torch": torch.__version__,
    }
    before = json.loads((out / RECORD).read_text()) if (out / RECORD).is_file() else {}
    if before.get("finished") == LEARNED and before["seed"] == seed:
        model = Qwen2ForCausalLM.from_pretrained(out, dtype=torch.float32).to(device)
        log = Log(out, tokenizer, before | {"settling_steps": settle.steps})
    else:
        model, log = build_model(tokenizer, seed).to(device), Log(out, tokenizer, facts)
        ladder, stream = Ladder(learn.steps), DocumentStream(tokenizer, training_descriptions(), seed, LADDER[0].diet)
        data = batches(stream, tokenizer.pad_token_id, seed)

        def climbing(step: int, smoothed: float) -> tuple[Tensor, Tensor]:
            stream.diet = ladder.diet(step, smoothed)
            return next(data)

        run(learn, model, Objective(tokenizer, seed).to(device), climbing, log)
        log.keep(model, LEARNED)
    stream = DocumentStream(tokenizer, training_descriptions(), seed + 1, Diet())
    settling = batches(stream, tokenizer.pad_token_id, seed + 1)
    run(settle, model, Objective(tokenizer, seed + 1).to(device), lambda *_: next(settling), log)
    log.keep(model, SETTLED)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--steps", type=int, default=LEARN.steps, help="of learning")
    parser.add_argument("--settling-steps", type=int, default=SETTLE.steps)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    o = parser.parse_args()
    train(
        o.out,
        learn=replace(LEARN, steps=o.steps),
        settle=replace(SETTLE, steps=o.settling_steps),
        threads=o.threads,
        seed=o.seed,
        device=o.device,
    )


if __name__ == "__main__":
    main()
