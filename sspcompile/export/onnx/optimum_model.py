"""Opens this folder with optimum: `model = load(folder)`, an ORTModelForCausalLM.

Its class sizes the empty cache of a first forward pass as hidden_size / heads for every layer, which no model with
fewer heads has. Here the cache is sized from the graph's own inputs. Written for optimum-onnx 0.1 (transformers 4.57).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from optimum.onnxruntime import ORTModelForCausalLM


class SizedByTheGraph(ORTModelForCausalLM):
    """An ORTModelForCausalLM whose head counts may differ by layer."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: tuple[Any, ...] | None = None,
        **kwargs: Any,
    ) -> Any:
        if past_key_values is None:
            past_key_values = self._empty(len(input_ids), input_ids.device)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        return super().forward(input_ids, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs)

    def _empty(self, batch: int, device: torch.device) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        shapes = {value.name: value.shape for value in self.session.get_inputs()}
        tensors = [
            torch.zeros(batch, shapes[name][1], 0, shapes[name][3], dtype=self.dtype, device=device)
            for name in self.key_value_input_names
        ]
        return tuple(zip(tensors[::2], tensors[1::2], strict=True))


def load(folder: str | Path, **kwargs: Any) -> SizedByTheGraph:
    """The model in `folder`. Keyword arguments are those of `from_pretrained`."""
    # With I/O binding optimum would size every layer's output like the first one's.
    return SizedByTheGraph.from_pretrained(folder, use_io_binding=False, **kwargs)
