"""What computing holds beside the weights of a model, in bytes."""

from __future__ import annotations

from sspcompile.families import Geometry
from sspcompile.model.text import BATCH_LOGITS, BATCH_TOKENS, GRADIENT_TOKENS

# What a layer holds of every token while it runs: about so many hidden states, and so many rows of its widest product.
HIDDEN_STATES, WIDEST_PRODUCTS = 8, 3
# Logits in fp32, and their logarithms.
LOGITS_HELD = 2
DOUBLE, SINGLE = 8, 4


def working_bytes(g: Geometry, vocab: int, widest: int, width: int) -> int:
    """The most that one batch of a build takes, with `widest` the rows of the largest matrix of a layer and `width`
    the bytes of a number:

        BATCH_TOKENS * (8 * hidden + 3 * widest) * width + 2 * min(BATCH_LOGITS, BATCH_TOKENS * vocabulary) * 4
        + the larger of
            GRADIENT_TOKENS * layers * hidden * width + 2 * layers * (heads * head size)^2 * 4
            the system of the widest matrix that a repair fits

    A backward pass holds what enters every layer, and the curvature of every o_proj is a pair of square matrices. A
    repair comes when both are gone.
    """
    forward = BATCH_TOKENS * (HIDDEN_STATES * g.hidden + WIDEST_PRODUCTS * widest) * width
    logits = LOGITS_HELD * min(BATCH_LOGITS, BATCH_TOKENS * vocab) * SINGLE
    curvature = 2 * g.layers * (g.heads * g.head_dim) ** 2 * SINGLE
    backward = GRADIENT_TOKENS * g.layers * g.hidden * width + curvature
    return forward + logits + max(backward, repair_bytes(g, g.width if g.has_channels else None))


def repair_bytes(g: Geometry, channels: int | None) -> int:
    """What the larger system of a layer takes: that of o_proj, or of down_proj for so many channels, None where that is
    not fitted. Of experts, one is fitted at a time."""
    attention = system_bytes(g.heads * g.head_dim, g.hidden, exact=True)
    return attention if channels is None else max(attention, system_bytes(channels, g.hidden))


def refitted_bytes(g: Geometry, masks: int, stored: int, computing: int, *, in_place: bool) -> tuple[int, int]:
    """What the down projections of so many repairs take, of `stored` bytes a number as they will be written, and what
    they take of the one that is measured, in `computing` bytes a number.

    `in_place`: whether its own matrices are computed with where they are of one kind (`weights.replaced`). Those of
    experts are not: they are put into a copy of the stack of their layer, with what was not refitted.
    """
    numbers = g.layers * g.channels * g.hidden
    shared = g.is_dense and in_place
    return masks * numbers * stored, 0 if shared or not masks else numbers * computing


def system_bytes(inputs: int, outputs: int, *, exact: bool = False) -> int:
    """What normal equations take (`repair/systems.py`): their sums, and beside them the larger of a product of a batch,
    in fp32 unless `exact`, and of the solution with its copy. Factors take the place of the sums."""
    sums = DOUBLE * inputs * (inputs + outputs)
    product = (DOUBLE if exact else SINGLE) * inputs * max(inputs, outputs)
    return sums + max(product, 2 * DOUBLE * inputs * outputs)
