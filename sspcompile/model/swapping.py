"""A function of a module in the place of its own, for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def swapped(module: nn.Module, function: Callable[..., Any], name: str = "forward") -> Iterator[None]:
    """Let a module run `function` in the place of its method `name`.

    A method of the class is restored by removing what hides it: kept on the module itself, it would be a reference from
    the module to itself, which holds the weights until the collector comes by.
    """
    own = module.__dict__.get(name)
    setattr(module, name, function)
    try:
        yield
    finally:
        if own is None:
            delattr(module, name)
        else:
            setattr(module, name, own)
