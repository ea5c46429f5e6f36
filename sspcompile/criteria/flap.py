"""FLAP: how much a head's contribution fluctuates, because what does not fluctuate could be replaced by a bias.

An et al., Fluctuation-based Adaptive Structured Pruning for Large Language Models, arXiv 2312.11983, methodology: the
fluctuation of input channel j is its sample variance times |W_:j|_2^2 (there "WIFV"); the values of a layer are
standardised (mean 0, deviation 1) before layers are compared, and a head is scored by the mean of its channels.
Adapted: the lowest score of the model is made zero. That moves all heads alike and changes no choice.

A channel of an MLP is scored in the same way at the input of down_proj, standardised over the channels of its layer.
The paper ranks heads and channels of all layers together by these standardised values ("AL-AM").
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sspcompile.criteria.channels import Moments, down_weight, head_sums, moments, output_weight
from sspcompile.criteria.units import CriterionInput, Structures, Units
from sspcompile.model.decoder import LoadedModel


def flap(loaded: LoadedModel, given: CriterionInput) -> np.ndarray:
    """[L, U]"""
    units = Units.of(loaded.geometry, given.granularity)
    found = units.sum(_heads(loaded, moments(loaded, given)))
    return found - found.min()


def flap_structures(loaded: LoadedModel, attention: Moments, mlp: Moments | None) -> Structures:
    """Standardised fluctuations, in deviations of a layer's channels from their mean; heads and channels are ranked
    together by them. They may be negative.
    """
    channels = None if mlp is None else _standard(loaded, mlp, down_weight)
    return Structures(_heads(loaded, attention), channels)


def _heads(loaded: LoadedModel, attention: Moments) -> np.ndarray:
    """[L, H]"""
    return head_sums(loaded, _standard(loaded, attention, output_weight)) / loaded.geometry.head_dim


def _standard(loaded: LoadedModel, found: Moments, weight: Callable[[LoadedModel, int], Tensor]) -> np.ndarray:
    """Fluctuation of every channel, with mean 0 and deviation 1 in its layer; 0 where all of a layer are alike."""
    layers = range(loaded.geometry.layers)
    squared = [weight(loaded, layer).square().sum(0, dtype=torch.float64).cpu() for layer in layers]
    fluctuation = found.variance * torch.stack(squared).numpy()  # [L, channels]
    deviation = fluctuation.std(1, ddof=1, keepdims=True)
    centred = fluctuation - fluctuation.mean(1, keepdims=True)
    return np.divide(centred, deviation, out=np.zeros_like(centred), where=deviation > 0)
