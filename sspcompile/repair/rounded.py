"""The masked, repaired model as it will be once it is rounded: what a repair that knows the rounding is judged by."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from sspcompile.model.blocks import Rounding
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.modules import down_proj, o_proj
from sspcompile.model.rounding import rounded_embedding, rounded_products
from sspcompile.slicing.mask import Kept


@contextlib.contextmanager
def rounded(loaded: LoadedModel, kept: Kept, rounding: Rounding) -> Iterator[None]:
    """Run the decoder with every matrix of its layers rounded, its embeddings where they are rounded too, and its head
    as it is. Around `masked`.
    """
    size = loaded.geometry.head_dim
    with contextlib.ExitStack() as stack:
        stack.enter_context(rounded_embedding(loaded, rounding, tied=loaded.geometry.tied))
        for index, layer in enumerate(loaded.layers):
            columns: dict[nn.Module, Tensor] = {o_proj(layer): torch.from_numpy(np.repeat(kept.heads[index], size))}
            if kept.channels is not None:
                columns[down_proj(layer)] = torch.from_numpy(kept.channels[index])
            stack.enter_context(rounded_products(layer, rounding, columns))
        yield
