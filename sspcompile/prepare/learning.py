"""How a Recogniser is learned: multinomial logistic regression with a ridge, in the features' leading directions.

Texts that a fit did not see, in folds, choose the ridge and the temperature, and say above which share of "none" a text
is called unknown. What is kept is fitted on all texts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from sspcompile.prepare.axes import standardisation
from sspcompile.prepare.calibration import cross_fitted, expected_calibration_error, fit_temperature
from sspcompile.prepare.recogniser import Recogniser

# Of coordinates with variances around 1.
RIDGES = (1.0, 0.5, 0.35, 0.25, 0.18, 0.12, 0.06)
# What texts say of their domain lies in few directions of the features; more of them cost time.
DIRECTIONS = 384
# This share of the domains' own held-out text is called unknown.
FALSE_ALARM = 0.1
# Where a model tells nearly all text apart, that line would be next to nothing; less than this is not worth a word.
LEAST_LINE = 0.1
# 0 leaves the variances along the directions as they are to each other, 1 makes them equal.
WHITENED = 0.4
STEPS, GRADIENT_TOLERANCE, LOSS_TOLERANCE = 1000, 1e-7, 1e-12
# Below this share of the largest eigenvalue a direction is rounding.
DEAD_SHARE = 1e-10


@dataclass(frozen=True)
class Examples:
    """Texts that teach: features [N, R, d], classes [N], weights [N], and the folds [N] that keep apart what teaches
    from what is judged. Class `domains` says "none of them"; without text of it there is no such class. `subjects` [N]:
    which one a text of that class is of.
    """

    features: np.ndarray
    classes: np.ndarray
    weights: np.ndarray
    folds: np.ndarray
    subjects: np.ndarray
    domains: int

    @property
    def inside(self) -> np.ndarray:
        """[N] bool: of a domain."""
        return self.classes < self.domains


@dataclass(frozen=True)
class Learned:
    """A recogniser, and the calibrated probabilities [N, C] that fits without a text's own fold gave it. `unseen` [M]:
    the share of "none" that the M texts of no domain got from fits without their whole subject, None where all are of
    one. `ece_before` and `ece_after`: expected calibration error of `held_out` at temperature 1, and at one that the
    other folds fitted.
    """

    recogniser: Recogniser
    held_out: np.ndarray
    unseen: np.ndarray | None
    ridge: float
    ece_before: float
    ece_after: float


def learn(examples: Examples, layers: np.ndarray) -> Learned:
    """What recognises the domains from the features of these `layers` [R] of the model."""
    classes, weights, folds = examples.classes, examples.weights, examples.folds
    mean, scale = standardisation(examples.features)
    standard = ((examples.features - mean) / scale).reshape(len(classes), -1)
    # Standardisation and directions know no class, so the folds may share them.
    basis = leading(standard)
    x = standard @ basis
    judged = {ridge: _held_out(x, examples, folds, ridge) for ridge in RIDGES}
    fits = {ridge: fit_temperature(logits, classes, weights) for ridge, logits in judged.items()}
    ridge = min(RIDGES, key=lambda one: fits[one].loss)
    held_out = softmax(judged[ridge] * np.exp(-fits[ridge].log), axis=1)
    targets = np.eye(held_out.shape[1])[classes]
    solution = fit(x, classes, weights, held_out.shape[1], ridge)
    weight = (solution[:, :-1] @ basis.T).reshape(len(solution), *mean.shape).swapaxes(0, 1)
    line = unknown_line(held_out, examples)
    return Learned(
        Recogniser(layers, mean, scale, weight, solution[:, -1], np.array([fits[ridge].log]), np.array([line])),
        held_out,
        _unseen(x, examples, ridge, fits[ridge].log),
        ridge,
        expected_calibration_error(softmax(judged[ridge], axis=1), targets),
        expected_calibration_error(cross_fitted(judged[ridge], classes, weights, folds), targets),
    )


def unknown_line(held_out: np.ndarray, examples: Examples) -> float:
    """The share of "none" that FALSE_ALARM of the domains' held-out texts exceed, by weight, and LEAST_LINE at least; 1
    without that class.
    """
    if examples.inside.all():
        return 1.0
    share, weights = held_out[examples.inside, -1], examples.weights[examples.inside]
    order = np.argsort(share)
    below = np.cumsum(weights[order]) / weights.sum()
    return max(LEAST_LINE, float(share[order][np.searchsorted(below, 1 - FALSE_ALARM)]))


def leading(x: np.ndarray) -> np.ndarray:
    """Directions of most energy [D, r] of rows [N, D], at most DIRECTIONS, scaled so that the rows' variances along
    them come closer to each other: what is loud in every text does not drown what tells texts apart.
    """
    # The smaller of the two Gram matrices has the same eigenvalues.
    wide = x.shape[0] < x.shape[1]
    values, vectors = np.linalg.eigh(x @ x.T if wide else x.T @ x)
    kept = np.flatnonzero(values > DEAD_SHARE * values[-1])[::-1][:DIRECTIONS]
    basis = x.T @ vectors[:, kept] / np.sqrt(values[kept]) if wide else vectors[:, kept]
    variance = values[kept] / len(x)
    return basis / np.sqrt((1 - WHITENED) * variance.mean() + WHITENED * variance)


def _unseen(x: np.ndarray, examples: Examples, ridge: float, log_temperature: float) -> np.ndarray | None:
    """The share of "none" of its texts, each by a fit that saw no text of its subject."""
    inside = examples.inside
    if len(np.unique(examples.subjects[~inside])) < 2:
        return None
    folds = np.where(inside, examples.folds, examples.subjects % (examples.folds.max() + 1))
    logits = _held_out(x, examples, folds, ridge)
    return softmax(logits * np.exp(-log_temperature), axis=1)[~inside, -1]


def _held_out(x: np.ndarray, examples: Examples, folds: np.ndarray, ridge: float) -> np.ndarray:
    """Logits [N, C] of each text by a fit without its fold."""
    count = int(examples.classes.max()) + 1
    found = np.zeros((len(x), count))
    for fold in np.unique(folds):
        own = folds == fold
        solution = fit(x[~own], examples.classes[~own], examples.weights[~own], count, ridge)
        found[own] = x[own] @ solution[:, :-1].T + solution[:, -1]
    return found


def fit(x: np.ndarray, classes: np.ndarray, weights: np.ndarray, count: int, ridge: float) -> np.ndarray:
    """Minimise mean weighted cross entropy + ridge/2 |w|^2 over [C, r + 1], the bias last and without a penalty.

    x [N, r], classes [N] below `count`, weights [N].
    """
    share, targets = weights / weights.sum(), np.eye(count)[classes]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        solution = flat.reshape(count, -1)
        log_p = log_softmax(x @ solution[:, :-1].T + solution[:, -1], axis=1)
        error = share[:, None] * (np.exp(log_p) - targets)
        slope = np.concatenate([error.T @ x + ridge * solution[:, :-1], error.sum(0)[:, None]], axis=1)
        value = -(share * (targets * log_p).sum(1)).sum() + ridge / 2 * np.square(solution[:, :-1]).sum()
        return float(value), slope.ravel()

    found = minimize(
        loss,
        np.zeros(count * (x.shape[1] + 1)),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": STEPS, "gtol": GRADIENT_TOLERANCE, "ftol": LOSS_TOLERANCE},
    )
    return found.x.reshape(count, -1)
