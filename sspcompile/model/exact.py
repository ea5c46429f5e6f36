"""Running a decoder in float64 throughout, which is where equality is decided.

fp32 loses what a difference of 1e-5 of the logits could be: rounding of a model of thirty layers, or a fault. A model
that is merely loaded in float64 is no better: most classes norm, rotate and weigh attention in fp32 whatever they are
given. Two models that agree to 1e-16 come out of each of these upcasts bit for bit the same, which hides how far apart
they are, until one number in about 1e8 lies on the edge between two fp32 values and falls to either side; from there on
the two differ as fp32 differs. So inside `in_float64` an upcast to fp32 is one to float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _Widened(TorchFunctionMode):
    """Every request for fp32 is one for float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.view:  # reads the same bytes as another type, and rounds nothing
            return func(*args, **(kwargs or {}))
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        named = {key: _widened(value) for key, value in (kwargs or {}).items()}
        return func(*map(_widened, args), **named)


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """What runs inside holds every number in float64; parameters and buffers must have it before."""
    with _Widened():
        yield
