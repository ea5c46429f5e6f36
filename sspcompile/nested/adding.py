"""A member on its way into a nested artifact: its mask, its repair, and its row of the index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sspcompile.checkpoint import Checkpoint, OutputTensor, write_checkpoint
from sspcompile.checkpoint.writer import content_of
from sspcompile.families import Geometry
from sspcompile.model.divergence import Divergence
from sspcompile.nested.files import digest_of, parts_of
from sspcompile.nested.index import Loss, Member, Nested, dump_nested, repair_file
from sspcompile.nested.low_rank import LowRank, Stored, file_tensors
from sspcompile.nested.order import Order, Size
from sspcompile.select.judging import Reported
from sspcompile.slicing.mask import dump_mask
from sspcompile.slicing.plan import make_plan
from sspcompile.workspace import MODEL, NESTED

# Of the factors of a difference and their scales, in a safetensors file; a matrix in full comes in raw words.
DTYPES: Mapping[type, str] = {np.int8: "I8", np.float32: "F32"}


def add_member(
    folder: Path, checkpoint: Checkpoint, size: Size, repair: Mapping[str, Stored], cost: Reported
) -> Member:
    """Write a member's mask and repair into the artifact's folder, and describe it. `checkpoint` is the dense one."""
    mask = size.mask
    dtypes = {name: checkpoint.tensors[name].dtype for name in repair}
    file = write_repair(folder / MODEL, size.share, repair, dtypes)
    plan = make_plan(checkpoint, mask)
    member = Member(
        share=size.share,
        size=plan.size,
        groups=size.prefix.groups,
        widths=size.prefix.widths,
        parameters=plan.sliced.parameters,
        weight_bytes=plan.sliced.weight_bytes,
        kv_bytes_per_token=plan.sliced.kv_bytes_per_token,
        flops_per_token=plan.sliced.flops_per_token,
        flops_per_position=plan.sliced.flops_per_position,
        added_flops_per_token=sum(one.flops for one in repair.values() if isinstance(one, LowRank)),
        repair=file,
        sha256=digest_of(folder / MODEL / file) if file is not None else None,
        repair_bytes=sum(words.nbytes for words in file_tensors(repair).values()),
        refitted=tuple(sorted(repair)),
        own=_loss(cost.own),
        off=_loss(cost.off) if cost.off is not None else None,
    )
    path = folder / member.mask
    path.parent.mkdir(exist_ok=True)
    path.write_text(dump_mask(mask), "utf-8")
    return member


def _loss(divergence: Divergence) -> Loss:
    return Loss(mean_kl=divergence.mean_kl, top1_agreement=divergence.top1_agreement)


def write_repair(folder: Path, share: float, repair: Mapping[str, Stored], dtypes: Mapping[str, str]) -> str | None:
    """Write a member's matrices, columns in the order of removal; gives their file, None without any."""
    if not repair:
        return None
    file = repair_file(share)
    (folder / file).parent.mkdir(parents=True)
    tensors = [
        OutputTensor(name, DTYPES.get(words.dtype.type, dtypes[matrix]), words.shape, content_of(words))
        for matrix, stored in repair.items()
        for name, words in file_tensors({matrix: stored}).items()
    ]
    write_checkpoint((folder / file).parent, tensors)
    return file


def index_of(g: Geometry, order: Order, members: Sequence[Member]) -> Nested:
    """The index of an artifact with these members, the whole model first."""
    return Nested(
        head_dim=g.head_dim,
        group_size=g.group_size,
        parts=parts_of(g),
        groups=order.groups,
        channels=order.channels,
        members=tuple(members),
    )


def write_index(folder: Path, nested: Nested) -> None:
    """Write nested.json beside the weights, where the class that switches sizes reads it."""
    (folder / MODEL / NESTED).write_text(dump_nested(nested), "utf-8")
