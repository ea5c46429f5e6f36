"""Optimal brain surgeon on heads: what removing a unit costs after the best change of everything that stays.

With x the input of a layer's o_proj and W its weight, a change D of W costs, to second order, half of the Fisher
information in its direction; with the Kronecker-factored Fisher H (x) G, H = E[x x^T] over tokens and G the sum of
g g^T over tokens per scored position (g the gradient of the model's own stochastic log-likelihood with respect to the
output of o_proj), it is 1/2 tr(D^T G D H) nats per token. Removing the columns R of W with the best change of all
others costs

    1/2 tr( (H^-1[R, R])^-1 (W^T G W)[R, R] ),    W <- W - W[:, R] (H^-1[R, R])^-1 H^-1[R, :]

(Hassibi and Stork, Second order derivatives for network pruning, 1993; the factors as in Martens and Grosse, Optimizing
Neural Networks with Kronecker-factored Approximate Curvature, arXiv 1503.05671; for whole structures as in Kurtic et
al., ZipLM, arXiv 2302.04089). G and W are never formed: the gradient with respect to x is y = W^T g, so W^T G W is the
sum of y y^T, and a change of W is one of both sides of it. Units of a layer are removed one by one, the cheapest first.

The same pass gives the Fisher information of gates on the heads (`fisher`): the gradient of a gate is x . y over the
head's channels, summed over a text; and of gates on the channels of the MLPs, at the input of down_proj, in the same
way. A channel of an expert has a gate for the tokens that visit the expert; to others it adds nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sspcompile.criteria.fisher import batch_generator, logit_cotangent
from sspcompile.criteria.units import CriterionInput, Units, rising
from sspcompile.model import journal
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.experts import one_by_one
from sspcompile.model.gradients import read_gradients, watched
from sspcompile.model.modules import down_proj, experts, o_proj
from sspcompile.model.text import Batch

# Of the mean of H's diagonal.
RIDGE = 1e-2


@dataclass(frozen=True)
class Curvature:
    """What one forward and one backward pass over N texts tell of every o_proj.

    `inputs` [L, n, n]: E[x x^T] over tokens, n = heads * head_dim; `writes` [L, n, n]: W^T G W, nats per scored
    position; both fp32. `gates` [N, L, U] float64: Fisher information of the units' gates per text and scored position.
    `channels` [L, mlps * width] float64: the same of gates on the channels of the MLPs, or of all experts, mean over
    texts; None where some layers have experts and some have none.
    """

    inputs: Tensor
    writes: Tensor
    gates: np.ndarray
    channels: np.ndarray | None = None


def curvature(loaded: LoadedModel, given: CriterionInput) -> Curvature:
    """One stochastic gradient per text (`normal` targets of `fisher`), in batches."""
    g = loaded.geometry
    n = g.heads * g.head_dim
    inputs, writes = (torch.zeros(g.layers, n, n) for _ in range(2))
    units = Units.of(g, given.granularity)
    gates = np.zeros((given.prompts, g.layers, units.count))
    channels = np.zeros((g.layers, g.channels)) if g.has_channels else None
    places = [o_proj(layer) for layer in loaded.layers]
    places += [down_proj(layer) for layer in loaded.layers] if g.is_dense else []
    tokens = scored = 0
    walk = journal.current().state("curvature", loaded, [given.batches, given.seed, given.granularity])
    begun = 0
    if (stand := walk.read()) is not None:
        inputs, writes = (torch.from_numpy(stand[name]).clone() for name in ("inputs", "writes"))
        gates[...] = stand["gates"]
        if channels is not None:
            channels[...] = stand["channels"]
        begun, tokens, scored = stand["counts"].tolist()
    for index, batch in list(enumerate(given.batches))[begun:]:
        generator = batch_generator(loaded, given.seed, batch)
        real, positions = batch.attention_mask.bool(), batch.score_mask.sum(-1)
        rows = list(batch.rows)

        def read(
            place: int, x: Tensor, y: Tensor, real: Tensor = real, positions: Tensor = positions, rows: list[int] = rows
        ) -> None:
            layer = place % g.layers
            if place >= g.layers and channels is not None:
                channels[layer] += _information((x * y).float().sum(1), positions)
                return
            closing = (x * y).float().unflatten(-1, (units.count, -1)).sum((1, 3))  # padding has no gradient
            gates[rows, layer] = (closing.cpu().double().square() / positions.cpu()[:, None]).numpy()
            x, y = (part[real.to(part.device)].float() for part in (x, y))
            inputs[layer] += (x.T @ x).cpu()
            writes[layer] += (y.T @ y).cpu()

        def read_expert(layer: int, number: int, closing: Tensor, positions: Tensor = positions) -> None:
            if channels is not None:
                channels[layer, number * g.width : (number + 1) * g.width] += _information(closing, positions)

        cotangent = partial(logit_cotangent, targets="normal", generator=generator)
        sparse = channels is not None and not g.is_dense
        with _closing_experts(loaded, batch, read_expert) if sparse else contextlib.nullcontext():
            read_gradients(loaded, batch, places, "o_proj or down_proj", cotangent, read)
        tokens += int(real.sum())
        scored += int(positions.sum())
        counts = np.array([index + 1, tokens, scored])
        walk.keep(partial(_stand, inputs, writes, gates, channels, counts))
        given.report(index + 1, len(given.batches))
    mean = None if channels is None else channels / max(1, given.prompts)
    # In place: a pair of these is as much as a layer's weights, for every layer.
    return Curvature(inputs.div_(max(1, tokens)), writes.div_(max(1, scored)), gates, mean)


def _information(closing: Tensor, positions: Tensor) -> np.ndarray:
    """Of gates whose gradients are `closing` [texts, gates], per scored position and summed over the texts."""
    return np.asarray((closing.cpu().double().square() / positions.cpu()[:, None]).sum(0))


@contextlib.contextmanager
def _closing_experts(loaded: LoadedModel, batch: Batch, read: Callable[[int, int, Tensor], None]) -> Iterator[None]:
    """A backward pass inside hands `read` (layer, number of an expert, gradients of the gates on its channels
    [texts, width]) for every expert that some token of the batch visits.
    """
    texts, length = batch.input_ids.shape

    def watch(layer: int, number: int, tokens: Tensor, x: Tensor) -> Tensor:
        def closing(x: Tensor, y: Tensor) -> None:
            sums = torch.zeros(texts, x.shape[1], device=x.device)
            read(layer, number, sums.index_add_(0, tokens // length, (x * y).float()))

        return watched(x, closing)

    with contextlib.ExitStack() as stack:
        for index in loaded.geometry.sparse:
            stack.enter_context(one_by_one(experts(loaded.layers[index]), partial(watch, index)))
        yield


def _stand(
    inputs: Tensor, writes: Tensor, gates: np.ndarray, channels: np.ndarray | None, counts: np.ndarray
) -> journal.Arrays:
    stand = {"inputs": inputs.numpy(), "writes": writes.numpy(), "gates": gates, "counts": counts}
    return stand if channels is None else stand | {"channels": channels}


def compensated(loaded: LoadedModel, given: CriterionInput) -> np.ndarray:
    """[L, U], see `removal_costs`."""
    units = Units.of(loaded.geometry, given.granularity)
    return costs_of(curvature(loaded, given), units)


def costs_of(found: Curvature, units: Units) -> np.ndarray:
    """Costs of removing units in nats per scored position, [L, U]."""
    pairs = zip(found.inputs, found.writes, strict=True)
    return np.stack([removal_costs(h.double(), m.double(), units.count) for h, m in pairs])


def removal_costs(inputs: Tensor, writes: Tensor, units: int) -> np.ndarray:
    """Costs [units] of a layer's units when they are removed one by one, the cheapest first.

    `inputs` and `writes` are [n, n] float64, a unit is n / units channels side by side. Each cost counts what the ones
    before it left behind, and never lies below an earlier one. What no text excites costs nothing.
    """
    strength = RIDGE * inputs.diagonal().mean()
    if not strength > 0:
        return np.zeros(units)
    damped = inputs.clone()
    damped.diagonal().add_(strength)
    inverse, writes = torch.cholesky_inverse(torch.linalg.cholesky(damped)), writes.clone()
    span, left, order, costs = len(inputs) // units, list(range(units)), [], []
    while left:
        places = [slice(at, at + span) for at in range(0, len(inverse), span)]
        prices = [0.5 * float((torch.linalg.inv(inverse[c, c]) * writes[c, c]).sum()) for c in places]
        cheapest = int(np.argmin(prices))
        order.append(left.pop(cheapest))
        costs.append(max(0.0, prices[cheapest]))
        c = places[cheapest]
        change = torch.linalg.solve(inverse[c, c], inverse[c])  # [span, n], as is the next
        moved = writes[c] - 0.5 * writes[c, c] @ change
        inverse.addmm_(inverse[:, c].clone(), change, alpha=-1)
        writes.addmm_(change.T, moved, alpha=-1).addmm_(moved.T, change, alpha=-1)
        # What was removed goes: every unit makes the rest cheaper, and rounding leaves nothing in its place.
        rest = torch.cat([torch.arange(c.start), torch.arange(c.stop, len(inverse))]).to(inverse.device)
        inverse, writes = inverse[rest][:, rest], writes[rest][:, rest]
    scores = np.empty(units)
    scores[order] = rising(costs)
    return scores
