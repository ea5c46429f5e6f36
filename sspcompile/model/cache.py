"""What transformers calls the key/value cache of a decoder: `cache` since 5.24, `past_key_values` before."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

NEW_NAME, OLD_NAME = "cache", "past_key_values"


def cache_argument(model: nn.Module) -> str:
    """The name under which the forward pass of `model` takes a cache, by its own signature.

    Code that a checkpoint brings can be older than the transformers that runs it, so no version decides this.
    """
    return NEW_NAME if NEW_NAME in _parameters(type(model).forward) else OLD_NAME


@functools.cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def cache_of(output: Any) -> Any:
    """The cache that a forward pass handed back, None where it has none.

    The new name is tried first: an output that has it warns when it is asked for the old one.
    """
    return getattr(output, NEW_NAME if hasattr(output, NEW_NAME) else OLD_NAME)
