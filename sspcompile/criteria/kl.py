"""Leave-one-out divergence: what the next-token distribution loses when one head, or one group, is closed.

KL(dense || closed), from prompts alone; the exact cost to which `fisher` is the second-order approximation.
Leave-one-out ablation of heads: Michel et al., Are Sixteen Heads Really Better than One?, arXiv 1905.10650, section 3,
there with the task's loss in place of the divergence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sspcompile.criteria.units import CriterionInput, Units
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.divergence import token_kl
from sspcompile.model.hooks import LayerCall, head_gates, recorded_calls
from sspcompile.model.logits import decoder_output, mean_by_sequence, scored_logits
from sspcompile.model.modules import layer_output
from sspcompile.model.text import Batch


class Closing:
    """How far masks that close one unit more than a base mask are from the dense model.

    Layers below the closed unit are not recomputed: half a forward pass on average. Holds the hidden states of all
    layers, [B, T, d] each, and the dense logits, [S, V], of every batch.
    """

    @torch.inference_mode()
    def __init__(self, loaded: LoadedModel, batches: Sequence[Batch], units: Units) -> None:
        self.loaded, self.batches, self.units = loaded, batches, units
        self.dense: list[Tensor] = []
        self.calls: list[Mapping[int, LayerCall]] = []
        self.base = torch.ones(units.layers, units.count, device=loaded.device)
        for batch in batches:
            with recorded_calls(loaded.layers) as calls:
                hidden = decoder_output(loaded, batch)
            self.dense.append(scored_logits(loaded, hidden, batch.score_mask))
            self.calls.append(calls)

    @torch.inference_mode()
    def close(self, layer: int, unit: int) -> None:
        """Add one unit to what the base mask closes, and record the layer inputs of that model."""
        self.base[layer, unit] = 0
        with head_gates(self.loaded, self.units.gates(self.base)):
            for number, batch in enumerate(self.batches):
                with recorded_calls(self.loaded.layers) as calls:
                    decoder_output(self.loaded, batch)
                self.calls[number] = calls

    @torch.inference_mode()
    def without(self, layer: int, unit: int) -> np.ndarray:
        """KL in nats with `unit` closed beside those of the base mask, one value per prompt in the batches' order."""
        gates = self.base.clone()
        gates[layer, unit] = 0
        found = []
        with head_gates(self.loaded, self.units.gates(gates)):
            for batch, dense, calls in zip(self.batches, self.dense, self.calls, strict=True):
                closed = scored_logits(self.loaded, self._resume(calls, layer), batch.score_mask)
                found.append(mean_by_sequence(token_kl(dense, closed), batch.score_mask).cpu().numpy())
        return np.concatenate(found)

    def _resume(self, calls: Mapping[int, LayerCall], first: int) -> Tensor:
        """The decoder's normalised output, recomputed from the recorded input of layer `first` on."""
        hidden = calls[first].hidden
        for index in range(first, len(self.loaded.layers)):
            hidden = layer_output(self.loaded.layers[index](hidden, *calls[index].rest, **calls[index].options))
        return self.loaded.model.model.norm(hidden)


def leave_one_out(loaded: LoadedModel, given: CriterionInput) -> np.ndarray:
    """KL(dense || one unit closed) in nats, mean over each prompt's scored positions, [N, L, U] float64."""
    units = Units.of(loaded.geometry, given.granularity)
    found = np.zeros((given.prompts, units.layers, units.count))
    total = len(given.batches) * units.layers
    for number, batch in enumerate(given.batches):
        closing = Closing(loaded, [batch], units)
        for layer in range(units.layers):
            for unit in range(units.count):
                found[list(batch.rows), layer, unit] = closing.without(layer, unit)
            given.report(number * units.layers + layer + 1, total)
    return found
