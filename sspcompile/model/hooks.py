"""Contexts that look at a forward pass, change it or end it; each is gone when its `with` block is left.

A hook that does not fire is an error: a value that silently comes from somewhere else is the fault this guards against.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sspcompile.errors import RunError
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.experts import one_by_one
from sspcompile.model.modules import down_proj, experts, o_proj
from sspcompile.model.swapping import swapped

# Called with (index of the module, its positional arguments, its keyword arguments); what it returns, unless None,
# replaces the positional arguments.
Watcher = Callable[[int, tuple[Any, ...], dict[str, Any]], tuple[Any, ...] | None]


@contextlib.contextmanager
def _watched(modules: Sequence[nn.Module], watch: Watcher) -> Iterator[None]:
    """Call `watch` before each call of one of the modules."""

    def hook_for(index: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
            changed = watch(index, args, options)
            return None if changed is None else (changed, options)

        return hook

    handles = [m.register_forward_pre_hook(hook_for(index), with_kwargs=True) for index, m in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def reading(modules: Sequence[nn.Module], what: str, read: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """Hand each module's positional input to `read(index, x)`, and the module what that gives, unless None; `what` they
    are is said in errors.

    Raises RunError when a module was called without a positional tensor, or was not called at all.
    """
    fired: set[int] = set()

    def watch(index: int, args: tuple[Any, ...], _options: dict[str, Any]) -> tuple[Any, ...] | None:
        if not args or not isinstance(args[0], Tensor):
            raise RunError(f"Layer {index} calls its {what} without a positional input.")
        fired.add(index)
        changed = read(index, args[0])
        return None if changed is None else (changed, *args[1:])

    with _watched(modules, watch):
        yield
        silent = sorted(set(range(len(modules))) - fired)
        if silent:
            raise RunError(f"The {what} of layers {silent} was never called; nothing was captured there.")


class _Ended(Exception):
    """No error, but the way out of a forward pass of which nothing more is needed; never leaves `until`."""


def end_pass() -> None:
    """End the forward pass that runs inside `until`; called from a reader."""
    raise _Ended


@contextlib.contextmanager
def until() -> Iterator[None]:
    """What runs inside may be ended by `end_pass` and goes on behind the block."""
    with contextlib.suppress(_Ended):
        yield


@contextlib.contextmanager
def input_of(module: nn.Module, what: str, *, then_end: bool = False) -> Iterator[list[Tensor]]:
    """The positional input of a module's calls inside the context, in order; with `then_end` the first one ends it."""
    seen: list[Tensor] = []

    def read(_index: int, x: Tensor) -> None:
        seen.append(x)
        if then_end:
            end_pass()

    with until(), reading([module], what, read):
        yield seen


@contextlib.contextmanager
def head_gates(loaded: LoadedModel, gates: Tensor) -> Iterator[None]:
    """Multiply every head's output by its gate, at the input of o_proj, for the duration of the context.

    `gates` is [layers, heads], or [layers, batch, heads] for one gate per sequence. With zeros and ones this is the
    masked model, the oracle that every sliced or exported file is compared with. Gradients flow into `gates`.
    """
    g = loaded.geometry
    if gates.shape[0] != g.layers or gates.shape[-1] != g.heads or gates.dim() not in (2, 3):
        raise ValueError(f"gates {tuple(gates.shape)} for {g.layers} layers of {g.heads} heads")

    def watch(index: int, args: tuple[Any, ...], _options: dict[str, Any]) -> tuple[Any, ...]:
        x, gate = args[0], gates[index]
        batch, tokens, _ = x.shape
        scale = gate.to(x)  # layers may lie on several devices
        scale = scale.view(1, 1, g.heads, 1) if gate.dim() == 1 else scale.view(batch, 1, g.heads, 1)
        return ((x.view(batch, tokens, g.heads, g.head_dim) * scale).view_as(x), *args[1:])

    with _watched([o_proj(layer) for layer in loaded.layers], watch):
        yield


@contextlib.contextmanager
def channel_gates(loaded: LoadedModel, gates: Tensor) -> Iterator[None]:
    """Multiply every channel of the MLPs by its gate, at the input of down_proj, or of every expert's, for the duration
    of the context.

    `gates` is [layers, mlps * width].
    """
    g = loaded.geometry
    if gates.shape != (g.layers, g.channels):
        raise ValueError(f"gates {tuple(gates.shape)} for {g.layers} layers of {g.channels} channels")
    if not g.is_dense:
        with contextlib.ExitStack() as stack:
            for layer, row in zip(loaded.layers, gates, strict=True):
                stack.enter_context(expert_gates(layer, row.view(g.mlps, g.width)))
            yield
        return

    def watch(index: int, args: tuple[Any, ...], _options: dict[str, Any]) -> tuple[Any, ...]:
        return args[0] * gates[index].to(args[0]), *args[1:]  # layers may lie on several devices

    with _watched([down_proj(layer) for layer in loaded.layers], watch):
        yield


@contextlib.contextmanager
def expert_gates(layer: nn.Module, gates: Tensor) -> Iterator[None]:
    """The same of one layer that has experts: `gates` is [experts, width]."""

    def gated(number: int, _tokens: Tensor, channels: Tensor) -> Tensor:
        return channels * gates[number].to(channels)

    with one_by_one(experts(layer), gated):
        yield


@contextlib.contextmanager
def without(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Run a decoder as if these layers were not there: each gives back the hidden state that it is called with.

    With a cache they run nevertheless: positions and masks of what follows are counted by what some layer has stored.
    """

    def around(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(hidden_states: Tensor, *args: Any, **options: Any) -> Any:
            if options.get("past_key_values") is not None:
                forward(hidden_states, *args, **options)
            return hidden_states

        return run

    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(swapped(layer, around(layer.forward)))
        yield


@dataclass(frozen=True)
class LayerCall:
    """How the decoder called one layer: the hidden state [B, T, d] it was given, and everything else."""

    hidden: Tensor
    rest: tuple[Any, ...]
    options: Mapping[str, Any]


@contextlib.contextmanager
def recorded_calls(layers: Sequence[nn.Module]) -> Iterator[dict[int, LayerCall]]:
    """Record how each decoder layer is called, so that it can be called again with another hidden state.

    Raises RunError when a layer was not called, or got its hidden state by keyword.
    """
    calls: dict[int, LayerCall] = {}

    def watch(index: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if not args:
            raise RunError(f"Layer {index} is called without a positional hidden state.")
        calls[index] = LayerCall(args[0], args[1:], dict(options))

    with _watched(layers, watch):
        yield calls
        if len(calls) != len(layers):
            raise RunError(f"Only {len(calls)} of {len(layers)} layers were called.")


@contextlib.contextmanager
def passed_over(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Run a decoder around modules: each gives back the hidden state that it is called with.

    How layers are called (positions, masks) does not depend on hidden states, so it can be recorded without a pass.
    """
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(swapped(module, lambda hidden_states, *_, **__: hidden_states))
        yield


@contextlib.contextmanager
def answered(module: nn.Module, answer: Tensor) -> Iterator[None]:
    """Run around the attention of a layer, whose output [B, T, d] is known: it gives `answer` and no weights."""
    with swapped(module, lambda *_, **__: (answer, None)):
        yield
