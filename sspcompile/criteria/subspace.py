"""The published importance: how much of a head's write into the residual stream points along a domain's direction.

I[l, h, k] = E[(u_k . w)^2 / (|w|^2 + eps)], w = W_o[:, h] o_h: head h's slice of the o_proj input times its columns
of o_proj (the bias belongs to no head). SubspacePath Pruner, ICML 2026, "head importance". The text leaves open whether
|w| is the norm in the residual stream (`hidden`) or in the probes' K-dimensional space (`probe`): both are here.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sspcompile.criteria.channels import head_columns
from sspcompile.criteria.units import CriterionInput, Units
from sspcompile.errors import InputError
from sspcompile.model.capture import capture, pool
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.text import Batch

EPS = 1e-6


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


def hidden(loaded: LoadedModel, given: CriterionInput) -> np.ndarray:
    """[N, L, U, K], see `subspace`."""
    return subspace(loaded, given, "hidden")


def probe(loaded: LoadedModel, given: CriterionInput) -> np.ndarray:
    """[N, L, U, K], see `subspace`."""
    return subspace(loaded, given, "probe")


def subspace(loaded: LoadedModel, given: CriterionInput, norm: str) -> np.ndarray:
    """Mean over each prompt's real tokens: [N, L, U, K] float64, for unit directions [L, K, d].

    Raises InputError when the given has no directions.
    """
    if given.directions is None:
        raise InputError("The subspace criteria read probe directions.", hint="Give the toolkit.")
    g = loaded.geometry
    found = np.zeros((given.prompts, g.layers, g.heads, given.directions.shape[1]))
    units = torch.from_numpy(given.directions).float().to(loaded.device)
    columns = [head_columns(loaded, layer) for layer in range(g.layers)]
    for index, batch in enumerate(given.batches):
        rows = list(batch.rows)

        def read(layer: int, x: Tensor, batch: Batch = batch, rows: list[int] = rows) -> None:
            outputs = x.float().unflatten(-1, (g.heads, g.head_dim))
            shares = write_shares(outputs, columns[layer].to(x.device), units[layer].to(x.device), norm)
            found[rows, layer] = pool(shares.flatten(2), batch.attention_mask).unflatten(1, shares.shape[2:]).cpu()

        capture(loaded, batch, read)
        given.report(index + 1, len(given.batches))
    return Units.of(g, given.granularity).sum(found, axis=2)
