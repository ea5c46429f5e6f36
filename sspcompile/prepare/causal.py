"""Causal importance, from prompts alone: what the next-token distribution loses when a head is closed.

With gates a on the heads and p_a the model's prediction, closing head h costs KL(p_1 || p_{a_h = 0}). To second
order this is F_hh / 2 with F the Fisher information of the gates at 1. `leave_one_out` measures the first,
`fisher` estimates F_hh.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sspcompile.loaded import LayerCall, LoadedModel, head_gates, layer_output, o_proj, recorded_calls
from sspcompile.prepare.text import Batch

TARGETS = ("normal", "sampled", "greedy")
FISHER_DRAWS = 4

Progress = Callable[[int, int], None]


def scored_logits(loaded: LoadedModel, hidden: Tensor, score_mask: Tensor) -> Tensor:
    """Logits at the scored positions only, [S, V] fp32, from the decoder's normalised output [B, T, d]."""
    return loaded.model.lm_head(hidden[score_mask]).float()


def _decoder(loaded: LoadedModel, batch: Batch) -> Tensor:
    return loaded.model.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state


def logit_cotangent(logits: Tensor, targets: str, generator: torch.Generator) -> Tensor:
    """A vector per position whose covariance is the Fisher information of the logits, diag(p) - p p^T; [S, V].

    `sampled`: gradient of log p(y), y drawn from p: e_y - p. `normal`: sqrt(p) e - p (sqrt(p) . e) with standard
    normal e: the same covariance, but not carried by rare tokens, hence far less noise when the model is sure.
    `greedy`: e_y - p with y the most likely token; not a draw, and small wherever the model is sure.
    """
    p = torch.softmax(logits.detach(), dim=-1)
    if targets == "normal":
        root = p.sqrt() * torch.randn(p.shape, generator=generator, device=p.device)
        return root - p * root.sum(-1, keepdim=True)
    if targets == "sampled":
        chosen = torch.multinomial(p, 1, generator=generator)
    elif targets == "greedy":
        chosen = p.argmax(-1, keepdim=True)
    else:
        raise ValueError(f"targets {targets!r}; accepted: {TARGETS}")
    return torch.zeros_like(p).scatter_(1, chosen, 1.0) - p


def gate_gradients(
    loaded: LoadedModel, batch: Batch, targets: str, draws: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """One tensor [B, L, H] per draw: gradient of each sequence's objective with respect to its own gates at 1.

    Gates stand per sequence, so one backward pass of the summed objective gives every sequence's gradient.
    """
    g = loaded.geometry
    gates = torch.ones(g.layers, len(batch.rows), g.heads, device=loaded.device, requires_grad=True)
    with torch.enable_grad(), head_gates(loaded, gates):
        logits = scored_logits(loaded, _decoder(loaded, batch), batch.score_mask)
    for draw in range(draws):
        cotangent = logit_cotangent(logits, targets, generator)
        (gradient,) = torch.autograd.grad(logits, gates, cotangent, retain_graph=draw + 1 < draws)
        yield gradient.transpose(0, 1)


def fisher(
    loaded: LoadedModel,
    batches: Sequence[Batch],
    prompts: int,
    targets: str = "normal",
    draws: int = FISHER_DRAWS,
    seed: int = 0,
    progress: Progress | None = None,
) -> np.ndarray:
    """Diagonal Fisher information of the head gates per prompt and scored position, [N, L, H] float64.

    Draws at different positions are independent with mean zero, so the square of the summed gradient has the
    expectation of the sum of squares; divided by the number of positions, long answers do not count for more.
    """
    g = loaded.geometry
    generator = torch.Generator(device=loaded.device).manual_seed(seed)
    found = np.zeros((prompts, g.layers, g.heads))
    for index, batch in enumerate(batches):
        squares = sum(x.double().square() for x in gate_gradients(loaded, batch, targets, draws, generator))
        positions = batch.score_mask.sum(-1).view(-1, 1, 1)
        found[list(batch.rows)] = (squares / (draws * positions)).cpu().numpy()
        if progress is not None:
            progress(index + 1, len(batches))
    return found


@contextlib.contextmanager
def _closed_head(loaded: LoadedModel, layer: int, head: int) -> Iterator[None]:
    size = loaded.geometry.head_dim

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0].clone()
        x[..., head * size : (head + 1) * size] = 0
        return (x, *args[1:])

    handle = o_proj(loaded.layers[layer]).register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _resume(loaded: LoadedModel, calls: Mapping[int, LayerCall], first: int) -> Tensor:
    """The decoder's normalised output, recomputed from the recorded input of layer `first` on."""
    hidden = calls[first].hidden
    for index in range(first, len(loaded.layers)):
        hidden = layer_output(loaded.layers[index](hidden, *calls[index].rest, **calls[index].options))
    return loaded.model.model.norm(hidden)


@torch.inference_mode()
def leave_one_out(
    loaded: LoadedModel, batches: Sequence[Batch], prompts: int, progress: Progress | None = None
) -> np.ndarray:
    """KL(dense || one head closed) in nats, mean over each prompt's scored positions, [N, L, H] float64.

    Layers below the closed head are not recomputed: half a forward pass per head on average.
    """
    g = loaded.geometry
    found = np.zeros((prompts, g.layers, g.heads))
    done, total = 0, len(batches) * g.total_heads
    for batch in batches:
        with recorded_calls(loaded) as calls:
            hidden = _decoder(loaded, batch)
        dense = torch.log_softmax(scored_logits(loaded, hidden, batch.score_mask), dim=-1)
        for layer in range(g.layers):
            for head in range(g.heads):
                with _closed_head(loaded, layer, head):
                    closed = torch.log_softmax(
                        scored_logits(loaded, _resume(loaded, calls, layer), batch.score_mask), dim=-1
                    )
                found[list(batch.rows), layer, head] = _per_sequence(dense, closed, batch.score_mask)
                done += 1
            if progress is not None:
                progress(done, total)
    return found


def _per_sequence(dense: Tensor, closed: Tensor, score_mask: Tensor) -> np.ndarray:
    """Mean KL of the scored positions of each sequence: log-probabilities [S, V] twice, mask [B, T] -> [B]."""
    divergence = (dense.exp() * (dense - closed)).sum(-1).double().clamp(min=0)
    owner = score_mask.nonzero()[:, 0]
    total = torch.zeros(len(score_mask), dtype=torch.float64, device=dense.device).index_add_(0, owner, divergence)
    return (total / score_mask.sum(-1)).cpu().numpy()
