"""The masked, repaired model as it will be once it is rounded: what a repair that knows the rounding is judged by."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from sspcompile.model.blocks import Rounding
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.modules import down_proj, o_proj
from sspcompile.model.rounding import rounded_embedding
from sspcompile.model.swapping import swapped
from sspcompile.slicing.mask import Kept


@contextlib.contextmanager
def rounded(loaded: LoadedModel, kept: Kept, rounding: Rounding) -> Iterator[None]:
    """Run the decoder with every matrix of its layers rounded, its embeddings where they are rounded too, and its head
    as it is. Around `masked`: weights are rounded when they are multiplied with, so that of a model that does not fit
    into memory no more of it is there at once.
    """
    size = loaded.geometry.head_dim
    with contextlib.ExitStack() as stack:
        stack.enter_context(rounded_embedding(loaded, rounding))
        for index, layer in enumerate(loaded.layers):
            columns = {id(o_proj(layer)): torch.from_numpy(np.repeat(kept.heads[index], size))}
            if kept.channels is not None:
                columns[id(down_proj(layer))] = torch.from_numpy(kept.channels[index])
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    stack.enter_context(_multiplying(module, rounding, columns.get(id(module))))
        yield


@contextlib.contextmanager
def _multiplying(module: nn.Linear, rounding: Rounding, columns: Tensor | None) -> Iterator[None]:
    """A linear module that rounds the weight that it finds, which `masked` may have put there. `columns`, bool [in]:
    those that will be written, all by default.
    """
    # accelerate puts a forward of its own around this one where it moves weights.
    place = "_old_forward" if hasattr(module, "_old_forward") else "forward"
    with swapped(module, partial(_rounded_product, module, rounding, columns), place):
        yield


def _rounded_product(module: nn.Linear, rounding: Rounding, columns: Tensor | None, x: Tensor) -> Tensor:
    weight = rounding.of(module.weight) if columns is None else rounding.of_columns(module.weight, columns)
    return linear(x, weight.to(x.dtype), module.bias)
