"""Experts one by one, so that what enters the down projection of each can be read and changed.

transformers stacks the experts of a layer and runs them by one of several implementations, some of which are a single
kernel. What it calls eager is written out here, with a place for whoever looks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from sspcompile.model.swapping import swapped
from sspcompile.model.weights import tensor_of

# Called with (number of an expert, the tokens [n] that visit it, counted through the batch, and their channels
# [n, width]); what it returns enters the expert's down projection instead.
Change = Callable[[int, Tensor, Tensor], Tensor]


# The parameter that stacks their down projections.
DOWN = "down_proj"


@contextlib.contextmanager
def one_by_one(module: nn.Module, change: Change) -> Iterator[None]:
    """Run the stacked experts of a layer one by one for the duration of the context, their channels as `change` says.

    Experts that no token visits are not run.
    """
    # accelerate puts a forward of its own around this one where it moves weights.
    place = "_old_forward" if hasattr(module, "_old_forward") else "forward"
    with swapped(module, partial(_run, module, change), place):
        yield


def down_of(module: nn.Module) -> Tensor:
    """The down projections of all experts of a layer, [experts, hidden, width], wherever they lie; see `tensor_of`."""
    found = tensor_of(module, DOWN)
    if found is None:
        raise AttributeError(f"{type(module).__name__} has no {DOWN}")
    return found


def alone(module: nn.Module, number: int, states: Tensor) -> tuple[Tensor, Tensor]:
    """The channels [n, width] of one of the stacked experts on what n tokens bring, [n, hidden], and what it makes of
    them, [n, hidden], not yet times their shares.
    """
    seen: list[Tensor] = []

    def read(_number: int, _tokens: Tensor, channels: Tensor) -> Tensor:
        seen.append(channels)
        return channels

    chosen = torch.full((len(states), 1), number, device=states.device)
    with one_by_one(module, read):
        output = module(states, chosen, torch.ones_like(chosen, dtype=states.dtype))
    return seen[0], output


def _run(module: Any, change: Change, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    """What tokens [tokens, d] get of the experts `chosen` [tokens, k], whose outputs count by `shares` [tokens, k]."""
    output = torch.zeros_like(hidden)
    for number in sorted(set(chosen.flatten().tolist())):
        tokens, place = torch.where(chosen == number)
        gate, up = linear(hidden[tokens], module.gate_up_proj[number]).chunk(2, dim=-1)
        channels = change(number, tokens, module.act_fn(gate) * up)
        written = linear(channels, module.down_proj[number]) * shares[tokens, place, None]
        output.index_add_(0, tokens, written.to(output.dtype))
    return output
