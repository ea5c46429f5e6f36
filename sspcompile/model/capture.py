"""One forward pass per batch that serves all layers: pooled residual features, and o_proj inputs as they pass by."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sspcompile.model import journal
from sspcompile.model.chat import BARE
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.finite import demand_finite
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
def capture(
    loaded: LoadedModel, batch: Batch, read_heads: HeadReader | None = None, layers: Sequence[int] | None = None
) -> Tensor:
    """Pooled residual stream after the attention of `layers` (all of them by default), ascending: [B, R, d] fp32 on the
    CPU. The o_proj inputs of every layer go to `read_heads`, for which all layers have to be read.

    The pass ends at the last of them: what lies behind is not computed.
    """
    read = range(loaded.geometry.layers) if layers is None else layers
    pooled: dict[int, Tensor] = {}

    def read_residual(layer: int, x: Tensor) -> None:
        if layer in read:
            pooled[layer] = pool(x, batch.attention_mask).cpu()
        if layer == read[-1]:
            end_pass()

    norms = [residual_norm(y) for y in loaded.layers[: read[-1] + 1]]
    with contextlib.ExitStack() as stack:
        stack.enter_context(reading(norms, "residual norm", read_residual))
        if read_heads is not None:
            stack.enter_context(reading([o_proj(y) for y in loaded.layers], "o_proj", _exactly(read_heads)))
        with until():
            loaded.model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return torch.stack([pooled[layer] for layer in read], dim=1)


def _pooled(loaded: LoadedModel, batch: Batch, layers: Sequence[int] | None) -> np.ndarray:
    """`capture` as an array. Raises RunError for states that are not finite: nothing could be learned of them."""
    pooled = capture(loaded, batch, layers=layers)
    demand_finite("hidden states", pooled)
    return pooled.numpy()


def features(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    max_tokens: int = MAX_TOKENS,
    on_batch: Steps = no_steps,
    *,
    layers: Sequence[int] | None = None,
    bare: bool = False,
) -> np.ndarray:
    """What tells domains apart: [N, R, d] float32 in the order of the prompts, of `layers` (ascending) or of all.

    The same call offline and online. `bare` leaves the chat template out, whose words are in every text and say nothing
    of its subject. Raises RunError where 16 bits are too few for the hidden states.
    """
    world, loaded = current(), replace(loaded, rendering=BARE) if bare else loaded
    batches = encode(loaded, prompts, max_tokens)
    read = loaded.geometry.layers if layers is None else len(layers)
    kept = journal.current().rows("features", loaded, [batches, None if layers is None else list(layers)])
    own = world.share(range(len(batches)))
    found = np.zeros((len(prompts), read, loaded.geometry.hidden), dtype=np.float32)
    for done, number in enumerate(own, 1):
        batch = batches[number]
        found[list(batch.rows)] = kept.of(number, partial(_pooled, loaded, batch, layers))
        on_batch(done, len(own))
    return world.total(found)
