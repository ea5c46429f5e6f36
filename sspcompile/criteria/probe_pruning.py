"""Probe Pruning: channel norms of a small, telling probe fused with those of everything seen.

Le et al., Probe Pruning: Accelerating LLMs through Dynamic Pruning via Model-Probing, arXiv 2502.15618, section 4: per
layer the sequences (5 %) and tokens (50 %) with the largest residual norm are the probe; its squared channel norms p
are fused with the historical ones h, each weighted by its own share, (p^2 + h^2) / (p + h); the importance of channel j
is | { |W_ij|^2 * |X_j|_2^2 }_i |_2, with the fused value as the squared norm.
Adapted: the paper prunes anew for every batch. Here the mask is static, so the probe is drawn from all prompts of a
domain, the history is the mean over all of them, and the probe's states are read out of the same full forward pass
instead of running the probe by itself. The channels are a head's inputs of o_proj, summed per head.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sspcompile.criteria.channels import head_sums, output_weight
from sspcompile.criteria.units import CriterionInput, Units
from sspcompile.model.capture import capture
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.hooks import reading
from sspcompile.model.modules import input_norm
from sspcompile.model.text import Batch

PROBE_SEQUENCES = 0.05
PROBE_TOKENS = 0.5


def probe_pruning(loaded: LoadedModel, given: CriterionInput) -> np.ndarray:
    """[L, U]"""
    units = Units.of(loaded.geometry, given.granularity)
    residual, probed, history = _states(loaded, given)
    sequences = math.ceil(PROBE_SEQUENCES * given.prompts)
    scores = []
    for layer in range(units.layers):
        chosen = np.argsort(-residual[:, layer], kind="stable")[:sequences]
        weight = output_weight(loaded, layer).double().pow(4).sum(0).sqrt().cpu().numpy()
        scores.append(weight * fuse(probed[chosen, layer].mean(0), history[layer]))
    return units.sum(head_sums(loaded, np.stack(scores)))


def fuse(probe: np.ndarray, history: np.ndarray) -> np.ndarray:
    """Each of the two weighted by its share of their sum; 0 where both are."""
    total = probe + history
    return np.divide(probe**2 + history**2, total, out=np.zeros_like(total), where=total > 0)


def probe_tokens(norms: Tensor, attention_mask: Tensor) -> Tensor:
    """Bool [B, T]: in each sequence the half of its real tokens with the largest norm, rounded up; norms [B, T]."""
    real = attention_mask.bool()
    ranked = norms.masked_fill(~real, -1.0).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return ranked < (PROBE_TOKENS * real.sum(1, keepdim=True)).ceil()


def _states(loaded: LoadedModel, given: CriterionInput) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean squared residual norm per prompt and layer [N, L], mean squared channels over each prompt's probe tokens
    [N, L, C], and over all real tokens of all prompts [L, C]."""
    g = loaded.geometry
    channels = g.heads * g.head_dim
    residual = np.zeros((given.prompts, g.layers))
    probed = np.zeros((given.prompts, g.layers, channels))
    history = np.zeros((g.layers, channels))
    tokens = 0
    for index, batch in enumerate(given.batches):
        norms: dict[int, Tensor] = {}

        def read_norm(layer: int, x: Tensor, norms: dict[int, Tensor] = norms) -> None:
            norms[layer] = x.float().norm(dim=-1)  # [B, T]

        def read_heads(layer: int, x: Tensor, norms: dict[int, Tensor] = norms, batch: Batch = batch) -> None:
            rows, mask = list(batch.rows), batch.attention_mask.to(x.device)
            real = mask.double()
            seen, squares = norms.pop(layer).to(x.device), x.double().square()  # [B, T] and [B, T, C]
            residual[rows, layer] = ((seen.double().square() * real).sum(1) / real.sum(1)).cpu().numpy()
            picked = probe_tokens(seen, mask).double()
            mean = torch.einsum("bt,btc->bc", picked, squares) / picked.sum(1, keepdim=True)
            probed[rows, layer] = mean.cpu().numpy()
            history[layer] += torch.einsum("bt,btc->c", real, squares).cpu().numpy()

        with reading([input_norm(layer) for layer in loaded.layers], "input norm", read_norm):
            capture(loaded, batch, read_heads)
        tokens += int(batch.attention_mask.sum())
        given.report(index + 1, len(given.batches))
    return residual, probed, history / max(1, tokens)
