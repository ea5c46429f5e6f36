"""The published importance: how much of a head's write into the residual stream points along a domain's direction.

I[l, h, k] = E[(u_k . w)^2 / (|w|^2 + eps)], w = W_o[:, h] o_h: head h's slice of the o_proj input times its columns
of o_proj (the bias belongs to no head). SubspacePath Pruner, ICML 2026, "head importance".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from sspcompile.loaded import LoadedModel, o_proj
from sspcompile.placement import weight_of
from sspcompile.prepare.capture import capture, pool
from sspcompile.prepare.text import Batch

EPS = 1e-6
NORMS = ("hidden", "probe")


def head_columns(loaded: LoadedModel, layer: int) -> Tensor:
    """o_proj's columns of each query head, [H, d, hd] fp32. The head size is the model's own, never d / H."""
    g = loaded.geometry
    weight = weight_of(o_proj(loaded.layers[layer])).float()
    return weight.view(g.hidden, g.heads, g.head_dim).permute(1, 0, 2)


def write_shares(outputs: Tensor, columns: Tensor, directions: Tensor, norm: str) -> Tensor:
    """(u_k . w)^2 / (|w|^2 + eps) per token, [B, T, H, K].

    outputs [B, T, H, hd], columns [H, d, hd], directions [K, d]. `norm` is "hidden" for |w| in R^d or "probe" for
    the norm of (u_1 . w, ..., u_K . w). w itself, [B, T, H, d], is never formed: u_k . w = (U W_h) o and
    |w|^2 = o^T (W_h^T W_h) o.
    """
    reads = torch.einsum("kd,hdc->hkc", directions, columns)  # [H, K, hd]
    squared = torch.einsum("hkc,bthc->bthk", reads, outputs).square()
    if norm == "probe":
        return squared / (squared.sum(-1, keepdim=True) + EPS)
    grams = columns.mT @ columns  # [H, hd, hd]
    length = (torch.einsum("hce,bthe->bthc", grams, outputs) * outputs).sum(-1, keepdim=True)
    return squared / (length + EPS)


def subspace(
    loaded: LoadedModel,
    batches: Sequence[Batch],
    prompts: int,
    directions: np.ndarray,
    norm: str,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Mean over each prompt's real tokens: [N, L, H, K] float64, for unit directions [L, K, d]."""
    g = loaded.geometry
    found = np.zeros((prompts, g.layers, g.heads, directions.shape[1]))
    units = torch.from_numpy(directions).float().to(loaded.device)
    columns = [head_columns(loaded, layer) for layer in range(g.layers)]
    for index, batch in enumerate(batches):
        rows = list(batch.rows)

        def read(layer: int, x: Tensor, batch: Batch = batch, rows: list[int] = rows) -> None:
            outputs = x.float().unflatten(-1, (g.heads, g.head_dim))
            shares = write_shares(outputs, columns[layer].to(x.device), units[layer].to(x.device), norm)
            found[rows, layer] = pool(shares.flatten(2), batch.attention_mask).unflatten(1, shares.shape[2:]).cpu()

        capture(loaded, batch, read)
        if progress is not None:
            progress(index + 1, len(batches))
    return found
