"""A decoder that computes with rounded matrices, and looks its embeddings up in a rounded table."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

from sspcompile.model.blocks import Rounding
from sspcompile.model.decoder import TextModel
from sspcompile.model.modules import down_proj, o_proj
from sspcompile.model.swapping import swapped
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
def rounded_embedding(model: TextModel, rounding: Rounding, *, tied: bool) -> Iterator[None]:
    """Embeddings as they are looked up; `tied`: their table is the head's too."""

    def rounded(_module: nn.Module, _inputs: Any, rows: Tensor) -> Tensor:
        return rounding.of_embeddings(rows, tied=tied).to(rows.dtype)

    hook = model.model.get_input_embeddings().register_forward_hook(rounded)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def rounded_products(
    whole: nn.Module, rounding: Rounding, columns: Mapping[nn.Module, Tensor] | None = None
) -> Iterator[None]:
    """A module whose linear ones round the weights that they find, which others may have put there, when they multiply:
    of a model that does not fit into memory no more of it is there at once. `columns`, bool [in]: those of a matrix
    that will be written, all by default.
    """
    with contextlib.ExitStack() as stack:
        for module in whole.modules():
            if isinstance(module, nn.Linear):
                stack.enter_context(_multiplying(module, rounding, (columns or {}).get(module)))
        yield


@contextlib.contextmanager
def _multiplying(module: nn.Linear, rounding: Rounding, columns: Tensor | None) -> Iterator[None]:
    # accelerate puts a forward of its own around this one where it moves weights.
    place = "_old_forward" if hasattr(module, "_old_forward") else "forward"
    with swapped(module, partial(_rounded_product, module, rounding, columns), place):
        yield


def _rounded_product(module: nn.Linear, rounding: Rounding, columns: Tensor | None, x: Tensor) -> Tensor:
    weight = rounding.of(module.weight) if columns is None else rounding.of_columns(module.weight, columns)
    return linear(x, weight.to(x.dtype), module.bias)
