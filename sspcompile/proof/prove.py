"""Which of the two proofs a written folder gets: whole models where memory holds both, layer by layer elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from sspcompile.checkpoint.source import Checkpoint
from sspcompile.model.decoder import LoadedModel
from sspcompile.progress import Progress, stage_of
from sspcompile.proof.layerwise import compare_layerwise
from sspcompile.proof.parity import Parity, compare, demand, repair_of
from sspcompile.repair.repair import Repair, written_biases, written_down
from sspcompile.slicing.mask import HeadMask
from sspcompile.slicing.plan import SlicePlan, make_plan

# Activations, the interpreters and what torch allocates beside the weights.
MEMORY_SLACK = 1.2


@dataclass(frozen=True)
class Claim:
    """`written` computes what the model of `checkpoint` computes under `mask`.

    `repaired`: with the o_proj that the folder holds, and with `down` its down_proj. `custom_code`: the folder's own
    class loads it.
    """

    checkpoint: Checkpoint
    mask: HeadMask
    written: Path
    custom_code: bool
    repaired: bool = False
    down: bool = False


def prove(
    claim: Claim,
    load: Callable[[], LoadedModel],
    probes: Sequence[Sequence[int]],
    progress: Progress,
    *,
    layerwise: bool | None = None,
) -> tuple[Parity, bool]:
    """Compare on token ids `probes`; `load` brings the dense model. `layerwise` None decides by the free memory.

    Returns the parity, and whether it was found layer by layer. Raises ParityError when it does not hold.
    """
    plan = make_plan(claim.checkpoint, claim.mask)
    if layerwise is None:
        layerwise = whole_bytes(plan) > psutil.virtual_memory().available
    if layerwise:
        parity = compare_layerwise(
            claim.checkpoint,
            claim.mask,
            claim.written,
            probes,
            repaired=claim.repaired,
            down=claim.down,
            custom_code=claim.custom_code,
            progress=stage_of(progress, "proving"),
        )
    else:
        progress("proving", 0, 1)
        parity = compare(load(), claim.mask, _repair(claim, plan), claim.written, probes, custom_code=claim.custom_code)
        progress("proving", 1, 1)
    demand(parity)
    return parity, layerwise


def whole_bytes(plan: SlicePlan) -> int:
    """Memory that a comparison of whole models takes: both in fp32, and the larger one's file while it is read."""
    fp32 = 4 * (plan.dense.parameters + plan.sliced.parameters)
    return int(MEMORY_SLACK * (fp32 + plan.dense.weight_bytes))


def _repair(claim: Claim, plan: SlicePlan) -> Repair | None:
    if not claim.repaired:
        return None
    return Repair(
        repair_of(claim.written, plan, claim.mask).weights,
        written_biases(claim.written, plan.geometry),
        written_down(claim.written, plan.geometry) if claim.down else {},
    )
