"""Fitting the down projections of experts; repair/repair.py has the formula.

The experts of a layer are fitted one after another, so that one system is held at a time: no fit needs another's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sspcompile.model.experts import alone, down_of
from sspcompile.model.hooks import answered, recorded_calls
from sspcompile.model.modules import attention, experts
from sspcompile.repair.dense import Dense
from sspcompile.repair.systems import system_of


@dataclass(frozen=True)
class _Visits:
    """What the experts of a layer are given of a batch with n real tokens: their `states` [n, hidden], the numbers of
    the k experts that each visits, `chosen` [n, k], and what those count in it, `shares` [n, k].

    `lacking` [n, hidden]: what the layer would still lack if none of its channels were cut. `weights` [n]: what the
    tokens count in a fit.
    """

    states: Tensor
    chosen: Tensor
    shares: Tensor
    lacking: Tensor
    weights: Tensor

    def of(self, number: int) -> tuple[Tensor, Tensor]:
        """The tokens that visit an expert [m], and its share in each [m]."""
        tokens, place = torch.where(self.chosen == number)
        return tokens, self.shares[tokens, place]


def fit_experts(
    dense: Dense,
    index: int,
    hidden: Sequence[Tensor],
    attended: Sequence[Tensor],
    targets: Sequence[Tensor],
    kept: Tensor,
    ridge: float,
    least: float,
) -> Iterator[tuple[int, Tensor]]:
    """The number of each expert that some text visits, and its refitted down projection [hidden, width] in float64,
    with zeros in the columns of channels that are not `kept`, bool [experts, width].

    `hidden`: what enters the layer, `attended`: what its attention puts out, `targets`: what the layer should put out,
    all [B, T, hidden] per batch. Held are the inputs of the experts and what the layer lacks, for all tokens, and the
    system of one expert.
    """
    module = experts(dense.loaded.layers[index])
    batches = enumerate(zip(hidden, attended, targets, strict=True))
    visits = [_visits(dense, index, number, *of_batch) for number, of_batch in batches]
    for number, weight in enumerate(down_of(module)):
        if any(bool((one.chosen == number).any()) for one in visits):
            yield number, _fit(module, number, weight, visits, kept[number].to(weight.device), ridge, least)


def _visits(dense: Dense, index: int, number: int, hidden: Tensor, attended: Tensor, target: Tensor) -> _Visits:
    layer = dense.loaded.layers[index]
    with answered(attention(layer), attended), recorded_calls([experts(layer)]) as calls:
        uncut = dense.run(index, number, hidden)
    real = dense.real[number].to(uncut.device)
    lacking, flat = dense.missing(uncut, target)[real], real.flatten()
    chosen, shares = (one[flat] for one in calls[0].rest)
    return _Visits(calls[0].hidden[flat], chosen, shares.float(), lacking, dense.weights[number].to(uncut.device))


def _fit(
    module: nn.Module,
    number: int,
    weight: Tensor,
    visits: Sequence[_Visits],
    columns: Tensor,
    ridge: float,
    least: float,
) -> Tensor:
    rows, inputs = sum(len(one.of(number)[0]) for one in visits), int(columns.sum())
    system = system_of(rows, inputs, len(weight), weight.device)
    for one in visits:
        tokens, shares = one.of(number)
        if len(tokens):
            of_all = one.shares[tokens].sum(-1)
            channels, whole = alone(module, number, one.states[tokens])
            wanted = whole.float() + one.lacking[tokens] / of_all[:, None]
            system.add(channels[:, columns], wanted, one.weights[tokens] * shares * of_all)
    # Relative to the energy of inputs, a few tokens would be met exactly however firm the ridge of many is.
    firm = ridge * max(1.0, inputs / rows)
    full = torch.zeros(weight.shape, dtype=torch.float64)
    full[:, columns.cpu()] = system.solve(weight[:, columns].T, firm, least).T.cpu()
    return full
