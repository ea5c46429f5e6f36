"""A decoder layer whose matrices are rounded, and embeddings that are looked up in a rounded table."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from sspcompile.model.blocks import Rounding
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.modules import down_proj, o_proj
from sspcompile.model.weights import replaced, weight_of


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
