"""The stages of `build --nested`, counted before it is begun; those that it shares with other builds are `stages`'."""

from __future__ import annotations

from collections.abc import Iterator

from sspcompile.api.parts import Lengths, Part, Parts
from sspcompile.api.stages import (
    DOUBLE,
    Stage,
    comparing,
    layer_multiplications,
    probe_tokens,
    proving,
    reading,
    refitted_width,
    repairing,
)
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.dense import DenseModel
from sspcompile.model.placement import Placement
from sspcompile.nested.choose import one_size
from sspcompile.request.request import Request
from sspcompile.select.search import COMPARED_FIT

# Multiplications of all eigenvectors of a symmetric matrix [n, n], by n^3.
EIGENVECTORS = 9


def deciding_members(
    request: Request, dense: DenseModel, loaded: LoadedModel, lengths: Lengths, parts: Parts, placement: Placement
) -> Iterator[Stage]:
    """What `choose_members` and `measured` measure, and the proofs."""
    cut = [one_size(request, share) for share in request.options.shares[1:]]
    middle, members = cut[len(cut) // 2], len(cut)
    yield from reading(cut[-1], loaded, lengths, parts)
    yield from comparing(middle, dense, loaded, parts.fit)
    widths = [refitted_width(one, loaded) for one in cut]
    some = parts.fit.some(COMPARED_FIT)
    repairs = repairing("room for repairs of the members", some, widths, request, dense, loaded)
    yield repairs
    if repairs.passes:
        yield Stage("inputs of the repaired members", *some, members)
        yield Stage("low-rank repairs", *some, 2 * members * _decomposing(loaded, widths, some))
        for share, width in zip(request.options.shares[1:], widths, strict=True):
            yield repairing(f"repairing the member of {share:g}", parts.fit, [width], request, dense, loaded)
    yield Stage("judging the repairs", *parts.guard, 1 + (2 if repairs.passes else 1) * members)
    yield Stage("judging the members", *parts.reported, 1 + members)
    yield proving(request, dense, lengths, parts, placement)
    probes = members * probe_tokens(request, lengths, parts)  # the same for each, layer by layer
    yield Stage("proof of the members", len(probes), sum(probes), 2 * DOUBLE, steps=int(2 * DOUBLE) * members)


def _decomposing(loaded: LoadedModel, widths: list[int | None], read: Part) -> float:
    """Passes over `read` that take as long as the eigenvectors and products behind the differences of a member: of
    o_proj and, where it is refitted, down_proj, in float64.
    """
    g = loaded.geometry
    inputs = [g.heads * g.head_dim, *([max(filter(None, widths))] if any(widths) else [])]
    taken = sum(EIGENVECTORS * g.hidden**3 + 2 * g.hidden**2 * one for one in inputs)
    return DOUBLE * taken / (layer_multiplications(g) * max(1, read.tokens))
