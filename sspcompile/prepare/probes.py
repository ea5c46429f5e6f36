"""Linear domain probes, one per layer: K independent sigmoids on standardised features.

The `subspace` criteria read the directions that they learn; the mixture of a scenario does not (`recogniser.py`).

Every (layer, domain) pair is a small convex problem of its own; Newton's method solves them side by side in fp64, in
the leading directions of the features.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from sspcompile.prepare.axes import standardisation

# Ridge in units of the mean non-zero eigenvalue of the feature covariance, so that it means the same at any width.
RIDGE = 0.03
HELD_OUT = 0.25
# Few descriptions stand beside many prompts; together they get this share of their domain's weight.
DESCRIPTION_SHARE = 0.25
# Newton's price grows with the square of the coordinates; what texts say of their domain lies in few of them.
DIRECTIONS = 256
NEWTON_STEPS = 50
NEWTON_TOLERANCE = 1e-9  # largest gradient entry
NEWTON_BYTES = 2**28  # intermediate memory of one group of layers


@dataclass(frozen=True)
class Probes:
    """weight [L, K, d] and bias [L, K] on standardised features; mean and scale [L, d]."""

    mean: np.ndarray
    scale: np.ndarray
    weight: np.ndarray
    bias: np.ndarray

    def logits(self, features: np.ndarray) -> np.ndarray:
        """[N, L, d] -> [N, L, K]."""
        standard = (features - self.mean) / self.scale
        return np.einsum("nld,lkd->nlk", standard, self.weight, optimize=True) + self.bias

    def directions(self) -> np.ndarray:
        """u[l, k]: the unit direction in the residual stream that layer l's probe reads for domain k, [L, K, d].

        A probe reads (f - mean) / scale, so its weight in the residual stream itself is weight / scale.
        """
        mapped = self.weight / self.scale[:, None, :]
        return mapped / np.linalg.norm(mapped, axis=-1, keepdims=True).clip(min=1e-300)


def split(groups: np.ndarray, seed: int, held_out: float = HELD_OUT) -> np.ndarray:
    """Held-out flags [N]: the share `held_out` of each group, rounded down, chosen by the seed."""
    rng = np.random.default_rng(seed)
    flags = np.zeros(len(groups), dtype=bool)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        flags[rng.permutation(members)[: int(len(members) * held_out)]] = True
    return flags


def sample_weights(labels: np.ndarray, is_description: np.ndarray) -> np.ndarray:
    """[N] weights with mean 1: equal totals per domain, DESCRIPTION_SHARE of each for its descriptions."""
    weights = np.zeros(len(labels))
    for domain in np.unique(labels):
        kinds = [(labels == domain) & is_description, (labels == domain) & ~is_description]
        shares = (DESCRIPTION_SHARE, 1.0 - DESCRIPTION_SHARE)
        present = sum(share for kind, share in zip(kinds, shares, strict=True) if kind.any())
        for kind, share in zip(kinds, shares, strict=True):
            if kind.any():
                weights[kind] = share / present / kind.sum()
    return weights * len(labels) / weights.sum()


def fit(features: np.ndarray, labels: np.ndarray, weights: np.ndarray, train: np.ndarray, domains: int) -> Probes:
    """Probes from the rows of features [N, L, d], labels [N] and weights [N] that the flags `train` [N] name."""
    mean, scale = standardisation(features[train])
    targets = np.eye(domains)[labels[train]]
    layers, width = features.shape[1:]
    weight, bias = np.zeros((layers, domains, width)), np.zeros((layers, domains))
    for group in _layer_groups(layers, domains, int(train.sum()), min(int(train.sum()), width, DIRECTIONS) + 1):
        x = (features[train][:, group].astype(np.float64) - mean[group]) / scale[group]
        w, b = solve(torch.from_numpy(x).transpose(0, 1), torch.from_numpy(targets), torch.from_numpy(weights[train]))
        weight[group], bias[group] = w.numpy(), b.numpy()
    return Probes(mean, scale, weight, bias)


def auc(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of every layer and domain against the rest: logits [N, L, K], labels [N] -> [L, K]."""
    return np.array(
        [
            [roc_auc_score(labels == k, logits[:, layer, k]) for k in range(logits.shape[2])]
            for layer in range(logits.shape[1])
        ]
    )


def _layer_groups(layers: int, domains: int, rows: int, width: int) -> Iterator[slice]:
    per_layer = 8 * domains * (rows * width + width * width)
    size = max(1, NEWTON_BYTES // per_layer)
    return (slice(first, min(layers, first + size)) for first in range(0, layers, size))


def solve(x: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Minimise mean weighted BCE + ridge/2 |w|^2 for every layer and domain at once (the bias is not penalised).

    x [L, N, d], targets [N, K], weights [N] -> weight [L, K, d], bias [L, K]. With more coordinates than rows the
    problem is solved in the rows' own span, which holds the minimiser (representer theorem), and in no more than its
    DIRECTIONS of most energy.
    """
    rows, width = x.shape[1:]
    ridge = RIDGE * (x.square().sum((1, 2)) / rows / min(rows, width)).clamp(min=1e-12)  # [L]
    basis = None
    if width > min(rows, DIRECTIONS):
        u, s, basis = torch.linalg.svd(x, full_matrices=False)
        x, basis = (u * s.unsqueeze(-2))[..., :DIRECTIONS], basis[..., :DIRECTIONS, :]
    design = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
    solution = _newton(design, targets.T, weights / rows, ridge)
    weight, bias = solution[..., :-1], solution[..., -1]
    return (weight if basis is None else weight @ basis), bias


def _newton(design: Tensor, targets: Tensor, weights: Tensor, ridge: Tensor) -> Tensor:
    """Damped Newton. design [L, N, r], targets [K, N], weights [N] (sum 1), ridge [L] -> [L, K, r], bias last."""
    layers, _, width = design.shape
    penalty = ridge[:, None, None].expand(layers, 1, width).clone()
    penalty[..., -1] = 0.0
    solution = design.new_zeros(layers, targets.shape[0], width)

    def loss_of(w: Tensor) -> Tensor:
        z = w @ design.mT  # [L, K, N]
        bce = torch.nn.functional.softplus(z) - targets * z
        return (bce * weights).sum(-1) + 0.5 * (penalty * w.square()).sum(-1)

    loss = loss_of(solution)
    for _ in range(NEWTON_STEPS):
        p = torch.sigmoid(solution @ design.mT)
        gradient = (weights * (p - targets)) @ design + penalty * solution
        if gradient.abs().max() < NEWTON_TOLERANCE:
            break
        curvature = (weights * p * (1 - p)).unsqueeze(-1) * design.unsqueeze(1)  # [L, K, N, r]
        hessian = design.mT.unsqueeze(1) @ curvature + torch.diag_embed(penalty)
        # Separable classes flatten the bias direction; a trace of damping keeps the matrix invertible.
        hessian.diagonal(dim1=-2, dim2=-1).add_(1e-10)
        step = torch.linalg.solve(hessian, gradient.unsqueeze(-1)).squeeze(-1)
        scale = torch.ones_like(loss)
        for _ in range(30):
            trial_loss = loss_of(solution - scale.unsqueeze(-1) * step)
            worse = trial_loss > loss + 1e-15
            if not worse.any():
                break
            scale = torch.where(worse, scale / 2, scale)
        solution = solution - scale.unsqueeze(-1) * step
        loss = loss_of(solution)
    return solution


# What the expected answer looks like, read off the question; words of the subject matter are left out on purpose.
FORMAT_PATTERNS = (
    r"(?m)^\s*\(?[A-Ea-e][).:]\s",  # lettered options on lines of their own
    r"\b[A-D]\)|\([A-D]\)",  # lettered options inside the sentence
    r"(?i)\b(true or false|yes or no)\b",
    r"(?i)^\s*(is|are|was|were|do|does|did|can|has|have)\b",
    r"(?i)\bhow (many|much|old|long|far)\b",
    r"(?i)^\s*(what|which|who|whom|whose|when|where)\b",
    r"(?i)^\s*(why|explain|describe|discuss)\b",
    r"_{2,}|\.\.\.\s*$",  # a blank to fill
    r"\?\s*$",
    r":\s*$",
    r"```|\breturn\b|;\s*$",  # code
    r"\n",
)


def format_features(prompts: Sequence[str]) -> np.ndarray:
    """Answer-format features of the prompt text alone, [N, F]."""
    rows = [
        [*(len(re.findall(pattern, prompt)) for pattern in FORMAT_PATTERNS), np.log1p(len(prompt.split()))]
        for prompt in prompts
    ]
    return np.array(rows, dtype=np.float64)


def format_confound(prompts: Sequence[str], labels: np.ndarray, seed: int) -> dict[str, float]:
    """How well the domain can be guessed from answer style alone: cross-validated accuracy, chance, and p-value.

    Accuracy far above chance means that probes may have learned the format of the pools instead of the subject.
    """
    folds = int(min(5, np.bincount(labels).min()))
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    guess = cross_val_predict(
        model, format_features(prompts), labels, cv=StratifiedKFold(folds, shuffle=True, random_state=seed)
    )
    correct, chance = int((guess == labels).sum()), float(np.bincount(labels).max() / len(labels))
    p_value = binomtest(correct, len(labels), chance, alternative="greater").pvalue
    return {"accuracy": correct / len(labels), "chance": chance, "p_value": float(p_value)}
