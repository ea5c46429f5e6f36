"""Fitting FLAP's biases, which leave the weights alone; repair/repair.py has the formula."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from sspcompile.model.decoder import LoadedModel
from sspcompile.model.hooks import reading
from sspcompile.model.modules import down_proj, o_proj
from sspcompile.model.stored import in_double
from sspcompile.model.text import Batch
from sspcompile.model.weights import tensor_of, weight_of
from sspcompile.progress import Steps, no_steps
from sspcompile.repair.repair import Repair
from sspcompile.slicing.mask import Kept


@torch.inference_mode()
def fit_biases(
    loaded: LoadedModel,
    masks: Sequence[Kept],
    batches: Sequence[Batch],
    *,
    dtype: torch.dtype,
    anywhere: bool = False,
    progress: Steps = no_steps,
) -> list[Repair]:
    """FLAP's biases of o_proj for each mask, from one dense forward pass over the texts of `batches`; for channels
    those of down_proj, where the model has one, or with `anywhere` in every model. Experts have none.

    Works for every model in memory; only those whose o_proj has a bias can be written with it (`demand_place`).
    """
    places: list[nn.Linear] = [o_proj(layer) for layer in loaded.layers]
    if loaded.geometry.is_dense and (anywhere or loaded.geometry.mlp_bias):
        places += [down_proj(layer) for layer in loaded.layers]
    totals = [torch.zeros(place.in_features, dtype=torch.float64) for place in places]
    tokens = 0
    for number, batch in enumerate(batches):
        real = batch.attention_mask.bool()
        tokens += int(real.sum())

        def read(place: int, x: Tensor, real: Tensor = real) -> None:
            totals[place] += in_double(x[real.to(x.device)]).sum(0).cpu()

        with reading(places, "o_proj or down_proj", read):  # summed as they pass by: no layer's inputs are held
            loaded.model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        progress(number + 1, len(batches))
    means = [total / tokens for total in totals]
    size, layers = loaded.geometry.head_dim, loaded.geometry.layers
    found = []
    for kept in masks:
        # An attention that is gone has no place for a bias.
        gone = ~kept.heads & kept.heads.any(1, keepdims=True)
        biases = _biases(kept, places[:layers], means, np.repeat(gone, size, axis=1), dtype)
        channels = np.zeros((layers, 0), dtype=bool) if kept.channels is None else ~kept.channels
        found.append(Repair({}, biases, down_biases=_biases(kept, places[layers:], means[layers:], channels, dtype)))
    return found


def _biases(
    kept: Kept, places: Sequence[nn.Linear], means: Sequence[Tensor], removed: np.ndarray, dtype: torch.dtype
) -> dict[int, Tensor]:
    """Biases [hidden] by layer of projections (one a layer, or none), from what enters them on average and which of
    their inputs are `removed`, bool [layers, inputs].
    """
    biases: dict[int, Tensor] = {}
    for index, (projection, mean) in enumerate(zip(places, means, strict=False)):
        gone = torch.from_numpy(removed[index])
        if gone.any() and kept.stays(index):
            bias = tensor_of(projection, "bias")
            added = weight_of(projection).cpu().double()[:, gone] @ mean[gone]
            before = 0.0 if bias is None else bias.cpu().double()
            biases[index] = (before + added).to(dtype)
    return biases
