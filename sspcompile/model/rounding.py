"""What a matrix is worth once it is rounded, as ONNX Runtime rounds it: a repair that knows can mend it.

In a row of a weight [out, in] each block of neighbouring inputs has a scale s and a whole zero point z; a number w
becomes (q - z) s with q = clip(round(w / s + z), 0, 2^bits - 1). Blocks span their numbers and 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from sspcompile.model.decoder import LoadedModel
from sspcompile.model.modules import down_proj, o_proj
from sspcompile.model.weights import replaced, weight_of

# Inputs that share a scale unless a user says otherwise.
BLOCK = 32


@dataclass(frozen=True)
class Rounding:
    """To so many `bits`, in blocks of so many inputs."""

    bits: int
    block: int = BLOCK

    def of(self, weight: Tensor) -> Tensor:
        """The numbers [..., in] that the rounded rows stand for, in fp32."""
        numbers = weight.detach().float()
        inputs = numbers.shape[-1]
        blocks = pad(numbers, (0, -inputs % self.block)).unflatten(-1, (-1, self.block))
        low, high = blocks.amin(-1, keepdim=True).clamp(max=0), blocks.amax(-1, keepdim=True).clamp(min=0)
        highest = 2**self.bits - 1
        scale = (high - low) / highest
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # of a block of zeros
        zero = (-low / scale).round().clamp(0, highest)
        codes = (blocks / scale + zero).round().clamp(0, highest)
        return ((codes - zero) * scale).flatten(-2)[..., :inputs]

    def of_columns(self, weight: Tensor, kept: Tensor) -> Tensor:
        """The same of a matrix [out, in] of which the `kept` columns, bool [in], will be written; zeros elsewhere."""
        full = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        kept = kept.to(weight.device)
        if kept.any():
            full[:, kept] = self.of(weight[:, kept])
        return full


ROUNDINGS: Mapping[str, Rounding] = {"int8": Rounding(8), "int4": Rounding(4)}


@contextlib.contextmanager
def rounded_inside(layer: nn.Module, rounding: Rounding) -> Iterator[None]:
    """A decoder layer with every matrix rounded but the two that a repair fits, o_proj and down_proj."""
    fitted = (o_proj(layer), down_proj(layer))
    with contextlib.ExitStack() as stack:
        for module in layer.modules():
            if isinstance(module, nn.Linear) and all(module is not one for one in fitted):
                stack.enter_context(replaced(module, {"weight": rounding.of(weight_of(module))}))
        yield


@contextlib.contextmanager
def rounded_embedding(loaded: LoadedModel, rounding: Rounding) -> Iterator[None]:
    """Embeddings as they are looked up in a rounded table: where it is the head's too, and rows are whole blocks."""
    shared = loaded.geometry.tied and loaded.geometry.hidden % rounding.block == 0

    def rounded(_module: nn.Module, _inputs: Any, rows: Tensor) -> Tensor:
        return rounding.of(rows).to(rows.dtype)

    hook = loaded.model.get_input_embeddings().register_forward_hook(rounded) if shared else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
