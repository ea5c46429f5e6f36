"""One backward pass through a decoder, in bounded memory.

Logits exist for a few scored positions at a time. Of the layers' activations only the inputs are held; the rest is
computed again, one layer at a time (`recompute`). A pass over a batch so costs two forward passes and a backward one,
which is as dear as a forward one where weights have no gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sspcompile.model.decoder import LoadedModel
from sspcompile.model.hooks import reading
from sspcompile.model.logits import decoder_output, rows_at_once
from sspcompile.model.recompute import recomputed
from sspcompile.model.text import Batch

# Makes of logits [S, V] what they are multiplied with: the objective is the sum of the products.
Cotangent = Callable[[Tensor], Tensor]
# Called with (index of the module, its input x, the gradient of the objective with respect to x), same shapes.
GradientReader = Callable[[int, Tensor, Tensor], None]


def state_gradients(loaded: LoadedModel, states: Tensor, cotangent: Cotangent) -> Tensor:
    """Gradient of the objective with respect to normalised decoder outputs [S, d], a few positions at a time."""
    found = []
    for part in states.detach().split(rows_at_once(loaded)):
        with torch.enable_grad():
            part.requires_grad_()
            logits = loaded.logits_of(part)
        found += torch.autograd.grad(logits, part, cotangent(logits.detach()))
    return torch.cat(found).to(states.device)


def read_gradients(
    loaded: LoadedModel,
    batch: Batch,
    modules: Sequence[nn.Module],
    what: str,
    cotangent: Cotangent,
    read: GradientReader,
) -> None:
    """Run a batch forward and backward, and hand `read` what enters each of the modules, last module first.

    The objective is over the scored positions. `what` the modules are is said in errors. Raises RunError like
    `hooks.reading`.
    """

    def watch(index: int, x: Tensor) -> Tensor:
        return watched(x, partial(read, index))

    with torch.enable_grad(), _from_embeddings(loaded), recomputed(loaded.layers), reading(modules, what, watch):
        hidden = decoder_output(loaded, batch)
        states = hidden[batch.score_mask.to(hidden.device)]
        torch.autograd.backward(states, state_gradients(loaded, states, cotangent))


def watched(x: Tensor, read: Callable[[Tensor, Tensor], None]) -> Tensor:
    """The same numbers; a backward pass through them hands `read` them and the gradient with respect to them."""
    same: Tensor = _Watched.apply(x, read)
    return same


class _Watched(torch.autograd.Function):
    """The identity, whose backward pass hands its input and the gradient with respect to it to a reader.

    The input is saved as those of other operations are, so that `recomputed` need not hold it. What a hook holds stays
    from the forward pass on: in every layer the input of its down_proj, as wide as the MLP.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, read: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.read = read
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        ctx.read(x.detach(), gradient)
        return gradient, None


@contextlib.contextmanager
def _from_embeddings(loaded: LoadedModel) -> Iterator[None]:
    """Weights have no gradients; the graph begins at what the embedding puts out."""
    handle = loaded.model.get_input_embeddings().register_forward_hook(lambda _m, _args, out: out.requires_grad_())
    try:
        yield
    finally:
        handle.remove()
