"""The proof of a written folder: its bytes, then what it computes, with whole models or layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import psutil

from sspcompile.progress import Progress, stage_of
from sspcompile.proof.claim import Claim
from sspcompile.proof.contents import check_contents
from sspcompile.proof.layerwise import compare_layerwise
from sspcompile.proof.parity import Parity, demand
from sspcompile.proof.whole import compare_whole, whole_bytes


def prove(
    claim: Claim, probes: Sequence[Sequence[int]], progress: Progress, *, layerwise: bool | None = None
) -> Parity:
    """Read every tensor, and compare logits on token ids `probes`. `layerwise` None decides by the free memory.

    Raises ParityError when something is not as claimed, RunError when the written model does not load.
    """
    check_contents(claim, stage_of(progress, "comparing bytes"))
    if layerwise is None:
        layerwise = whole_bytes(claim) > psutil.virtual_memory().available
    if layerwise:
        parity = compare_layerwise(claim, probes, progress=stage_of(progress, "proving"))
    else:
        parity = compare_whole(claim, probes, progress=stage_of(progress, "proving"))
    demand(parity)
    return parity
