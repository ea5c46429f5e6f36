"""What says which domain a text is of: one softmax over the domains and "none of them", on features of a few layers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import softmax


@dataclass(frozen=True)
class Recogniser:
    """Reads R of the model's layers together. C classes: the K domains in their order, and behind them "none of them"
    where text of other subjects taught it.
    """

    layers: np.ndarray  # [R] int64, ascending
    mean: np.ndarray  # [R, d]
    scale: np.ndarray  # [R, d]
    weight: np.ndarray  # [R, C, d], reads standardised features
    bias: np.ndarray  # [C]
    log_temperature: np.ndarray  # [1]
    unknown_line: np.ndarray  # [1], a text with a larger share of "none" is called unknown

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Uncalibrated outputs for features of the `layers`, [N, R, d] -> [N, C]."""
        standard = (features - self.mean) / self.scale
        return np.einsum("nrd,rcd->nc", standard, self.weight, optimize=True) + self.bias

    def probabilities(self, features: np.ndarray, *, calibrated: bool = True) -> np.ndarray:
        """[N, R, d] -> [N, C], rows sum to 1; without calibration at temperature 1."""
        temperature = float(np.exp(self.log_temperature[0])) if calibrated else 1.0
        return softmax(self.logits(features).astype(np.float64) / temperature, axis=-1)
