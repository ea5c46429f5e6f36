"""How much a layer, or its attention, changes the residual stream: what goes whole is ranked by that.

Block influence (Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", arXiv
2403.03853): 1 - mean cosine of a token's state before and behind the layer. The same between any two places of the
stream says it of a run of layers (Gromov et al. 2024, arXiv 2403.17887, which takes the angle). So
does 1 - mean cosine before and behind the attention alone, the layer's MLP left out (He et al. 2024, "What Matters in
Transformers? Not All Attention is Needed", arXiv 2406.15786).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sspcompile.model import journal
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.hooks import reading
from sspcompile.model.modules import residual_norm
from sspcompile.model.text import Batch
from sspcompile.progress import Steps, no_steps

NAME, OF_ATTENTION = "block-influence", "attention-influence"


def state_distances(loaded: LoadedModel, batches: Sequence[Batch], progress: Steps = no_steps) -> np.ndarray:
    """1 - mean cosine over real tokens between the states before every two layers, [layers + 1, layers + 1] in [0, 2];
    the last place is behind all layers. One forward pass; all states of one batch are held.
    """
    return _distances(NAME, _cosines, loaded, batches, progress)


def attention_influence(loaded: LoadedModel, batches: Sequence[Batch], progress: Steps = no_steps) -> np.ndarray:
    """1 - mean cosine over real tokens between the states before and behind the attention of every layer, [layers] in
    [0, 2]. One forward pass.
    """
    return _distances(OF_ATTENTION, _cosines_around, loaded, batches, progress)


def _distances(
    name: str,
    cosines: Callable[[LoadedModel, Batch], np.ndarray],
    loaded: LoadedModel,
    batches: Sequence[Batch],
    progress: Steps,
) -> np.ndarray:
    """1 - mean of the `cosines`, which are summed over the real tokens of a batch."""
    kept, total = journal.current().rows(name, loaded, [batches]), np.zeros(())
    for number, batch in enumerate(batches):
        total = total + kept.of(number, partial(cosines, loaded, batch))
        progress(number + 1, len(batches))
    tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    return np.clip(1 - total / max(1, tokens), 0, 2)


def influence_of(distances: np.ndarray) -> np.ndarray:
    """Block influence [layers] from `state_distances`."""
    return np.diagonal(distances, offset=1).copy()


@torch.inference_mode()
def _cosines(loaded: LoadedModel, batch: Batch) -> np.ndarray:
    """Cosines between the states at every two places, summed over the real tokens of a batch."""
    real = batch.attention_mask.bool()
    states: dict[int, Tensor] = {}

    def read(place: int, x: Tensor) -> None:
        states[place] = normalize(x[real.to(x.device)].float(), dim=-1).flatten().cpu()

    with reading([*loaded.layers, loaded.model.model.norm], "layer", read):
        loaded.model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    stacked = torch.stack([states[place] for place in range(len(states))])
    return (stacked @ stacked.T).double().numpy()


@torch.inference_mode()
def _cosines_around(loaded: LoadedModel, batch: Batch) -> np.ndarray:
    """Cosines between the states before and behind every attention, summed over the real tokens of a batch."""
    real = batch.attention_mask.bool()
    before: dict[int, Tensor] = {}
    found = np.zeros(loaded.geometry.layers)

    def read(place: int, x: Tensor) -> None:
        layer, behind = divmod(place, 2)
        state = normalize(x[real.to(x.device)].float(), dim=-1)
        if behind:
            found[layer] = float((before.pop(layer).to(state.device) * state).sum())
        else:
            before[layer] = state

    modules = [module for layer in loaded.layers for module in (layer, residual_norm(layer))]
    with reading(modules, "layer or norm", read):
        loaded.model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return found
