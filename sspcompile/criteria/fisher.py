"""Fisher information of the head gates: what closing a head costs, to second order, from prompts alone.

With gates a on the heads and p_a the model's prediction, closing head h costs KL(p_1 || p_{a_h = 0}), which to second
order is F_hh / 2, F being the Fisher information of the gates at 1 (the textbook expansion of the divergence; gates on
heads as in Michel et al., Are Sixteen Heads Really Better than One?, arXiv 1905.10650, section 4, there with the
gradient of the task's loss). Targets come from the model's own prediction, so no labels are needed.

`rounds` measures the same on the model that earlier rounds left (iterative pruning as in Molchanov et al., Importance
Estimation for Neural Network Pruning, arXiv 1906.10771, section 3). A key/value group has one gate.

An expansion at 1 does not see a head whose work is saturated: one that copies a token with a wide margin changes no
prediction until it is nearly closed. `midway` therefore does the same with all gates that are left at one half, the
middle of the path from open to closed (as attributions along a path do: Sundararajan et al., Axiomatic Attribution for
Deep Networks, arXiv 1703.01365, section 3; their integral, by the midpoint rule).
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from sspcompile.criteria.units import CriterionInput, Units, rising
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.gradients import state_gradients
from sspcompile.model.hooks import head_gates
from sspcompile.model.logits import decoder_output
from sspcompile.model.recompute import recomputed
from sspcompile.model.stored import in_double
from sspcompile.model.text import Batch

TARGETS = ("normal", "sampled", "greedy")
# Of the score that is cached and of its variants: more texts are worth more than more draws of each.
DRAWS = 1
# Of the scores that remove heads on the way, where an early mistake is not made good.
ROUND_DRAWS = 4
ROUNDS = 4


def normal(loaded: LoadedModel, given: CriterionInput) -> np.ndarray:
    """[N, L, U], see `information`."""
    return information(loaded, given, "normal", DRAWS)


def sampled(loaded: LoadedModel, given: CriterionInput) -> np.ndarray:
    """[N, L, U], see `information`."""
    return information(loaded, given, "sampled", DRAWS)


def greedy(loaded: LoadedModel, given: CriterionInput) -> np.ndarray:
    """[N, L, U], see `information`."""
    return information(loaded, given, "greedy", 1)


def rounds(loaded: LoadedModel, given: CriterionInput) -> np.ndarray:
    """[L, U], see `eliminated`."""
    return eliminated(loaded, given, opening=1.0)


def midway(loaded: LoadedModel, given: CriterionInput) -> np.ndarray:
    """[L, U], see `eliminated`."""
    return eliminated(loaded, given, opening=0.5)


def eliminated(loaded: LoadedModel, given: CriterionInput, opening: float) -> np.ndarray:
    """Eliminate a quarter of all units per round, the least informative of the model as it then is; [L, U].

    A unit's score is its information in the round that removed it (mean over prompts); what is left in the last round
    is scored by that round. Later removals never score below earlier ones.
    """
    units = Units.of(loaded.geometry, given.granularity)
    kept = np.ones((units.layers, units.count), dtype=bool)
    order: list[int] = []
    costs: list[float] = []
    for number in range(1, ROUNDS + 1):
        found = information(loaded, given, "normal", ROUND_DRAWS, kept * opening, quiet=True).mean(0).ravel()
        alive = np.flatnonzero(kept)
        ranked = alive[np.argsort(found[alive], kind="stable")]
        removed = ranked[: units.total * number // ROUNDS - len(order)]
        order += removed.tolist()
        costs += found[removed].tolist()
        kept.flat[removed] = False
        given.report(number, ROUNDS)
    scores = np.empty(units.total)
    scores[order] = rising(costs)
    return scores.reshape(kept.shape)


def information(
    loaded: LoadedModel,
    given: CriterionInput,
    targets: str,
    draws: int,
    opened: np.ndarray | None = None,
    *,
    quiet: bool = False,
) -> np.ndarray:
    """Diagonal Fisher information of the unit gates per prompt and scored position, [N, L, U] float64.

    `opened` [L, U] is where the gates stand, 1 everywhere unless given. Draws at different positions are independent
    with mean zero, so the square of the summed gradient has the expectation of the sum of squares; divided by the
    number of positions, long answers do not count for more.
    """
    units = Units.of(loaded.geometry, given.granularity)
    found = np.zeros((given.prompts, units.layers, units.count))
    for index, batch in enumerate(given.batches):
        generator = batch_generator(loaded, given.seed, batch)
        drawn = gate_gradients(loaded, batch, units, targets, draws, generator, opened)
        squares = torch.stack([in_double(x).square() for x in drawn]).sum(0)
        positions = batch.score_mask.sum(-1).view(-1, 1, 1).to(squares.device)
        found[list(batch.rows)] = (squares / (draws * positions)).cpu().numpy()
        if not quiet:
            given.report(index + 1, len(given.batches))
    return found


def batch_generator(loaded: LoadedModel, seed: int, batch: Batch) -> torch.Generator:
    """A stream for every batch: what is drawn does not depend on which process looks at which batches."""
    stream = np.random.SeedSequence((seed, batch.rows[0])).generate_state(1, np.uint64)
    return torch.Generator(device=loaded.device).manual_seed(int(stream[0]))


def gate_gradients(
    loaded: LoadedModel,
    batch: Batch,
    units: Units,
    targets: str,
    draws: int,
    generator: torch.Generator,
    opened: np.ndarray | None = None,
) -> list[Tensor]:
    """One tensor [B, L, U] per draw: gradient of each sequence's objective with respect to its own gates.

    Gates stand per sequence, so one backward pass of the summed objective gives every sequence's gradient.
    """
    gates = torch.ones(units.layers, len(batch.rows), units.count, device=loaded.device)
    if opened is not None:
        gates *= torch.from_numpy(opened).to(gates).unsqueeze(1)
    gates.requires_grad_()
    cotangent = partial(logit_cotangent, targets=targets, generator=generator)
    found = []
    with torch.enable_grad(), head_gates(loaded, units.gates(gates)), recomputed(loaded.layers):
        hidden = decoder_output(loaded, batch)
        states = hidden[batch.score_mask.to(hidden.device)]
        for draw in range(draws):
            towards = state_gradients(loaded, states, cotangent)
            (gradient,) = torch.autograd.grad(states, gates, towards, retain_graph=draw + 1 < draws)
            found.append(gradient.transpose(0, 1))
    return found


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
