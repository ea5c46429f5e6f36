"""Which class holds a cut: the family's own, or another whose forward computes the same with the same tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sspcompile.errors import InputError, UnsupportedModelError
from sspcompile.families import FAMILIES, Family, Geometry


@dataclass(frozen=True)
class Host:
    """`family` loads the cut. `settings`: what its configuration must say to compute what the source computes.

    `zero_biases`: biases that its class has and the source has not ("qkv", "o"); they are written as zeros.
    """

    family: Family
    settings: Mapping[str, Any]
    zero_biases: tuple[str, ...] = ()


def uniform_host(geometry: Geometry, heads: int, wanted: str | None = None) -> Host:
    """The stock class for `heads` query heads in every layer: the one `wanted`, or the family's own where it can.

    Raises InputError for a `wanted` host that cannot hold this model losslessly, and UnsupportedModelError when no
    class can.
    """
    family = geometry.family
    candidates = (family.model_type, *family.hosts) if wanted is None else (wanted,)
    for name in candidates:
        host = hosting(geometry, name)
        if host is not None and _holds(geometry, host.family, heads):
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


def _holds(geometry: Geometry, family: Family, heads: int) -> bool:
    if family.hidden_must_divide and geometry.hidden % heads:
        return False
    return not (geometry.fixed_heads and heads != geometry.heads)


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


def hosting(geometry: Geometry, name: str) -> Host | None:
    """How the family called `name` holds this model losslessly, or None when it cannot."""
    source = geometry.family
    if name == source.model_type:
        return Host(source, {})
    if name not in source.hosts or geometry.windowed:
        return None
    host = FAMILIES[name]
    wanted = {"qkv": geometry.qkv_bias, "o": geometry.o_bias, "mlp": geometry.mlp_bias}
    rules = {"qkv": host.qkv_bias, "o": host.o_bias, "mlp": host.mlp_bias}
    switches: dict[str, bool] = {}
    for part, rule in rules.items():
        if isinstance(rule, str):
            switches[rule] = switches.get(rule, False) or wanted[part]
    has = {part: switches[rule] if isinstance(rule, str) else rule for part, rule in rules.items()}
    zero = tuple(part for part in rules if has[part] and not wanted[part])
    if "mlp" in zero or any(wanted[part] and not has[part] for part in rules):
        return None
    return Host(host, {**host.neutral(geometry.head_dim), **switches}, zero)
