"""Which class holds a cut: the family's own, or another whose forward computes the same with the same tensors."""

from __future__ import annotations

from sspcompile.errors import InputError, UnsupportedModelError
from sspcompile.families import Geometry, Host, holds, hosting


def uniform_host(geometry: Geometry, heads: int, wanted: str | None = None) -> Host:
    """The stock class for `heads` query heads in every layer: the one `wanted`, or the family's own where it can.

    Raises InputError for a `wanted` host that cannot hold this model losslessly, and UnsupportedModelError when no
    class can.
    """
    family = geometry.family
    candidates = (family.model_type, *family.hosts) if wanted is None else (wanted,)
    for name in candidates:
        host = hosting(geometry, name)
        if host is not None and holds(geometry, host.family, heads):
            return host
    what = f"{heads} heads at hidden_size {geometry.hidden}"
    if wanted is not None:
        raise _unfit(geometry, wanted, what)
    raise UnsupportedModelError(
        f"{family.architecture} cannot hold {what}, and no stock class with the same tensors can.",
        hint="Use --layout per-layer, or another --keep.",
    )


def named_host(text: str | None) -> str | None:
    """The family that a request names; None leaves the choice to `uniform_host`."""
    return None if text == "auto" else text


def demand_host(geometry: Geometry, layout: str, wanted: str | None) -> None:
    """Refuse a `wanted` host that no head count could make fit, before anything is computed. Raises InputError."""
    if wanted is None:
        return
    if layout == "per-layer":
        per_layer_host(geometry, wanted)
    elif hosting(geometry, wanted) is None:
        raise _unfit(geometry, wanted, "the tensors")


def _unfit(geometry: Geometry, wanted: str, what: str) -> InputError:
    family = geometry.family
    accepted = ", ".join(name for name in (family.model_type, *family.hosts) if hosting(geometry, name))
    return InputError(
        f"--host {wanted} cannot hold {what} of a {family.model_type} model without loss.",
        hint=f"Accepted: auto, {accepted}.",
    )


def per_layer_host(geometry: Geometry, wanted: str | None = None) -> Host:
    """The family whose classes the per-layer class extends: the first that does not look at global head
    counts, or its own.

    Raises InputError for another `wanted`.
    """
    own = Host(geometry.family, {})
    host = own
    if geometry.family.reads_heads:
        # transformers 5 forbids to read the global count as soon as head counts differ by layer.
        found = (hosting(geometry, name) for name in geometry.family.hosts)
        host = next((other for other in found if other is not None), own)
    if wanted not in (None, host.family.model_type):
        raise InputError(
            f"--host {wanted} is for uniform cuts; head counts that differ by layer need the class in the folder.",
            hint="Leave --host out, or compile the mask with --layout uniform.",
        )
    return host
