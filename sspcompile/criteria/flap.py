"""FLAP: how much a head's contribution fluctuates, because what does not fluctuate could be replaced by a bias.

An et al., Fluctuation-based Adaptive Structured Pruning for Large Language Models, arXiv 2312.11983, methodology: the
fluctuation of input channel j is its sample variance times |W_:j|_2^2 (there "WIFV"); the values of a layer are
standardised (mean 0, deviation 1) before layers are compared, and a head is scored by the mean of its channels.
Adapted: the lowest score of the model is made zero. That moves all heads alike and changes no choice.
"""

from __future__ import annotations

import numpy as np
import torch

from sspcompile.criteria.channels import head_sums, moments, output_weight
from sspcompile.criteria.units import CriterionInput, Units
from sspcompile.model.decoder import LoadedModel


def flap(loaded: LoadedModel, given: CriterionInput) -> np.ndarray:
    """[L, U]"""
    units = Units.of(loaded.geometry, given.granularity)
    squared = [output_weight(loaded, layer).square().sum(0, dtype=torch.float64) for layer in range(units.layers)]
    fluctuation = moments(loaded, given).variance * torch.stack(squared).cpu().numpy()  # [L, channels]
    deviation = fluctuation.std(1, ddof=1, keepdims=True)
    centred = fluctuation - fluctuation.mean(1, keepdims=True)
    standard = np.divide(centred, deviation, out=np.zeros_like(centred), where=deviation > 0)
    found = units.sum(head_sums(loaded, standard) / loaded.geometry.head_dim)
    return found - found.min()
