"""Numbers that are none: what 16 bits overflow to."""

from __future__ import annotations

from torch import Tensor

from sspcompile.errors import RunError


def demand_finite(what: str, *tensors: Tensor) -> None:
    """Raise RunError for NaN or infinite values in `what` the tensors are, such as "logits"."""
    if not all(bool(one.isfinite().all()) for one in tensors):
        raise RunError(
            f"The {what} hold NaN or infinite values.",
            hint="Load the model in float32 (--dtype float32) and try again.",
        )
