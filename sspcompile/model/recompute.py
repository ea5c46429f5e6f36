"""Gradients in the memory of one layer: a backward pass computes the inside of every layer again.

Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174: of each decoder layer its input is kept
alone, and what it computed inside is worked out anew when the backward pass gets there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sspcompile.model.swapping import swapped


@contextlib.contextmanager
def recomputed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """A forward pass inside keeps the input of each of `layers` for its backward pass, and nothing else of them.

    The backward pass may run inside or outside of the context, and of those that changed the forward pass: hooks that
    stand before modules of a layer (`hooks.head_gates`) and parameters that were put into them (`placement.replaced`)
    act on the second computation as they did on the first. Weights that lie on disk are read again. A layer must not
    write into a cache: it would do so twice.
    """
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(swapped(layer, _checkpointed(layer, layer.forward)))
        yield


def _checkpointed(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **options)
        first = _State(layer)

        def again(*args: Any, **options: Any) -> Any:
            with first.restored():
                return forward(*args, **options)

        # There is no dropout whose random numbers would have to be drawn again.
        return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False, **options)

    return run


class _State:
    """What acts on a forward pass of a layer and is not its own: hooks before its modules, and their parameters."""

    def __init__(self, layer: nn.Module) -> None:
        self._modules = list(layer.modules())
        self._taken = [self._of(module) for module in self._modules]

    @staticmethod
    def _of(module: nn.Module) -> tuple[dict[Any, Any], ...]:
        hooks: dict[Any, Any] = module._forward_pre_hooks
        return dict(hooks), dict(module._forward_pre_hooks_with_kwargs), dict(module._parameters)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        now = [self._of(module) for module in self._modules]
        self._put(self._taken)
        try:
            yield
        finally:
            self._put(now)

    def _put(self, states: Sequence[tuple[dict[Any, Any], ...]]) -> None:
        for module, (hooks, with_options, parameters) in zip(self._modules, states, strict=True):
            for held, wanted in (
                (module._forward_pre_hooks, hooks),
                (module._forward_pre_hooks_with_kwargs, with_options),
                (module._parameters, parameters),
            ):
                held.clear()
                held.update(wanted)
