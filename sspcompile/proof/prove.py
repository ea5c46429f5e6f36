"""The proof of a written folder: its bytes, then what it computes, with whole models or layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sspcompile.checkpoint.source import Checkpoint
from sspcompile.model.placement import ON_CPU, Placement, free_bytes, resolve, use_threads
from sspcompile.progress import Progress, stage_of
from sspcompile.proof.claim import Claim
from sspcompile.proof.contents import check_contents
from sspcompile.proof.layerwise import compare_layerwise
from sspcompile.proof.parity import Parity, demand
from sspcompile.proof.whole import compare_whole, whole_bytes


def prove(
    claim: Claim,
    probes: Sequence[Sequence[int]],
    progress: Progress,
    *,
    layerwise: bool | None = None,
    placement: Placement = ON_CPU,
) -> Parity:
    """Read every tensor, and compare logits on token ids `probes`. `layerwise` None decides by the memory that
    `placement` allows and its device has. Whole models are computed on a CUDA device where one was named, on the CPU
    otherwise: another GPU need not have float64.

    Raises ParityError when something is not as claimed, RunError when the written model does not load.
    """
    check_contents(claim, stage_of(progress, "comparing bytes"))
    return compare(claim, probes, progress, layerwise=layerwise, placement=placement)


def compare(
    claim: Claim,
    probes: Sequence[Sequence[int]],
    progress: Progress,
    *,
    layerwise: bool | None = None,
    placement: Placement = ON_CPU,
) -> Parity:
    """The second half of `prove`: what both compute. Raises like it."""
    if placement.on_cuda:
        resolve(placement)  # refused here where it is not there
    use_threads(placement)
    if layerwise is None:
        layerwise = goes_layerwise(claim.checkpoint, placement)
    if layerwise:
        parity = compare_layerwise(claim, probes, progress=stage_of(progress, "proving"))
    else:
        steps = stage_of(progress, "proving")
        parity = compare_whole(claim, probes, progress=steps, device=placement.exact_device)
    demand(parity)
    return parity


def goes_layerwise(dense: Checkpoint, placement: Placement) -> bool:
    """Whether a proof against this model has no room for it as a whole where that would be computed. Layer by layer it
    is computed on the CPU, wherever whole models are."""
    free = free_bytes(torch.device(placement.exact_device))
    return whole_bytes(dense) > (free if placement.memory is None else min(placement.memory, free))
