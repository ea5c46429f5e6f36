"""Tyr-the-Pruner's local step: what removing a head costs the layer's own output after the best change of what stays.

Li et al., Tyr-the-Pruner: Structural Pruning LLMs via Global Sparsity Distribution Optimization, NeurIPS 2025, arXiv
2503.09657, local pruning: with H = E[x x^T] of the inputs of o_proj, damped by a hundredth of the mean of its diagonal,
removing the columns R of its weight W costs

    1/2 tr( W[:, R] (H^-1[R, R])^-1 W[:, R]^T ),    W <- W - W[:, R] (H^-1[R, R])^-1 H^-1[R, :]

and H^-1 is brought up to date like W before the next units go. It is `obs` (see `curvature`) with all directions of the
output alike, in the place of the Fisher information of the output: no gradient is needed.
Adapted: units go one by one, where the authors' code takes all heads of a rate at once by default. That code also adds
the product of W[:, R] with H[R, :] W^T to the cost; it is left out, since at the least-squares solution the gradient is
zero. The paper builds every layer at several rates and searches how to spread a budget over layers, which no score can:
here a cost is a share of |W x|^2, the energy of the layer's attention output, so layers count by relative error, as in
Kurtic et al., ZipLM, arXiv 2302.04089. Inputs are those of the dense model; the paper's come from layers that were
pruned before.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sspcompile.criteria.channels import output_weight
from sspcompile.criteria.curvature import removal_costs
from sspcompile.criteria.units import CriterionInput, Units
from sspcompile.model.capture import capture
from sspcompile.model.decoder import LoadedModel


def tyr(loaded: LoadedModel, given: CriterionInput) -> np.ndarray:
    """[L, U], shares of each layer's output energy; 0 throughout a layer that writes nothing."""
    units = Units.of(loaded.geometry, given.granularity)
    scores = np.zeros((units.layers, units.count))
    for layer, inputs in enumerate(_second_moments(loaded, given)):
        weight = output_weight(loaded, layer).double().cpu()
        inputs, writes = inputs.double(), weight.T @ weight
        energy = 0.5 * float((inputs * writes).sum())  # half of E|W x|^2, as costs are halves
        if energy > 0:
            scores[layer] = removal_costs(inputs, writes, units.count) / energy
    return scores


def _second_moments(loaded: LoadedModel, given: CriterionInput) -> Tensor:
    """E[x x^T] over real tokens, x the input of o_proj: [L, n, n] fp32 on the CPU, n = heads * head_dim."""
    g = loaded.geometry
    n = g.heads * g.head_dim
    found = torch.zeros(g.layers, n, n)
    tokens = 0
    for index, batch in enumerate(given.batches):
        real = batch.attention_mask.bool()

        def read(layer: int, x: Tensor, real: Tensor = real) -> None:
            values = x[real.to(x.device)].float()  # [tokens, n]
            found[layer] += (values.T @ values).cpu()

        capture(loaded, batch, read)
        tokens += int(real.sum())
        given.report(index + 1, len(given.batches))
    return found.div_(max(1, tokens))
