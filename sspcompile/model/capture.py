"""One forward pass per batch that serves all layers: pooled residual features, and o_proj inputs as they pass by."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sspcompile.model import journal
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.hooks import end_pass, reading, until
from sspcompile.model.modules import o_proj, residual_norm
from sspcompile.model.parallel import current
from sspcompile.model.stored import double_device
from sspcompile.model.text import MAX_TOKENS, Batch, encode
from sspcompile.progress import Steps, no_steps
from sspcompile.request.prompts import Prompt

# Called with (layer, x): x is the input of that layer's o_proj, [B, T, heads * head_dim], on a device that has float64.
# It must not keep x.
HeadReader = Callable[[int, Tensor], None]


def pool(values: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean over real tokens in fp32: [B, T, d] and [B, T] -> [B, d]. Padding may hold anything, NaN included."""
    real = attention_mask.to(values.device).bool().unsqueeze(-1)  # layers may lie on several devices
    total = values.float().masked_fill(~real, 0.0).sum(1)
    return total / real.sum(1)


def _exactly(read_heads: HeadReader) -> HeadReader:
    return lambda layer, x: read_heads(layer, x.to(double_device(x.device)))


@torch.inference_mode()
def capture(loaded: LoadedModel, batch: Batch, read_heads: HeadReader | None = None) -> Tensor:
    """Pooled residual stream after attention, [B, L, d] fp32 on the CPU; o_proj inputs go to `read_heads`.

    The pass ends there: the last MLP, the final norm and the logits are not computed.
    """
    pooled: list[Tensor | None] = [None] * loaded.geometry.layers

    def read_residual(layer: int, x: Tensor) -> None:
        pooled[layer] = pool(x, batch.attention_mask).cpu()
        if layer == len(pooled) - 1:
            end_pass()

    with contextlib.ExitStack() as stack:
        stack.enter_context(reading([residual_norm(y) for y in loaded.layers], "residual norm", read_residual))
        if read_heads is not None:
            stack.enter_context(reading([o_proj(y) for y in loaded.layers], "o_proj", _exactly(read_heads)))
        with until():
            loaded.model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return torch.stack([x for x in pooled if x is not None], dim=1)


def _pooled(loaded: LoadedModel, batch: Batch) -> np.ndarray:
    """`capture` as an array."""
    return capture(loaded, batch).numpy()


def features(
    loaded: LoadedModel, prompts: Sequence[Prompt], max_tokens: int = MAX_TOKENS, on_batch: Steps = no_steps
) -> np.ndarray:
    """What the probes read: [N, L, d] float32 in the order of the prompts. The same call offline and online."""
    world = current()
    batches = encode(loaded, prompts, max_tokens)
    kept = journal.current().rows("features", loaded, batches)
    own = world.share(range(len(batches)))
    found = np.zeros((len(prompts), loaded.geometry.layers, loaded.geometry.hidden), dtype=np.float32)
    for done, number in enumerate(own, 1):
        batch = batches[number]
        found[list(batch.rows)] = kept.of(number, partial(_pooled, loaded, batch))
        on_batch(done, len(own))
    return world.total(found)
