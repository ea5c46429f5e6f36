"""`slice --from`: a member of a nested artifact becomes an ordinary cut. Like any `slice` without torch or a model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sspcompile.checkpoint import Checkpoint, Manifest, staged, write_manifest
from sspcompile.checkpoint.manifest import read_manifest
from sspcompile.export.card import CARD, slice_card
from sspcompile.nested.files import write_member
from sspcompile.nested.index import Member, Nested, read_nested
from sspcompile.progress import Progress, adding, silent
from sspcompile.slicing.mask import HeadMask, dump_mask, load_mask
from sspcompile.slicing.plan import SlicePlan, make_plan, plan_json
from sspcompile.workspace import MASK, MODEL, PLAN, PROBES


@dataclass(frozen=True)
class MemberCut:
    """A member of a nested artifact that is to be written: everything known before a byte is."""

    artifact: Path
    manifest: Manifest
    nested: Nested
    member: Member
    mask: HeadMask
    plan: SlicePlan


def open_member(artifact: Path, share: float, *, host: str | None = None) -> MemberCut:
    """The largest member of at most a share of the parameters, by headers and index alone.

    Raises InputError for what is no share, ArtifactError for what is no nested artifact, and BudgetError below the
    smallest member.
    """
    nested = read_nested(artifact)
    member = nested.member(share)
    mask = load_mask(artifact / member.mask)
    plan = make_plan(Checkpoint(artifact / MODEL), mask, host=host)
    return MemberCut(artifact, read_manifest(artifact), nested, member, mask, plan)


def cut_member(
    cut: MemberCut,
    out: Path,
    *,
    max_shard_bytes: int | None = None,
    checksums: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Manifest:
    """Write a member as an ordinary cut of the dense model, repair included; `verify` proves it. Whole or absent."""
    with staged(out, overwrite=overwrite, reads=(cut.artifact,)) as folder:
        refitted = write_member(
            cut.artifact,
            cut.nested,
            cut.member,
            cut.mask,
            cut.plan,
            folder,
            max_shard_bytes=max_shard_bytes,
            progress=adding(progress, "cutting", cut.plan.sliced.weight_bytes),
        )
        plan = plan_json(cut.plan)
        (folder / MASK).write_text(dump_mask(cut.mask), "utf-8")
        (folder / PLAN).write_text(json.dumps(plan, indent=1) + "\n", "utf-8")
        probes = json.loads((cut.artifact / PROBES).read_text("utf-8"))["probes"]
        proof = {"probes": probes, "refitted": sorted(refitted)}
        (folder / PROBES).write_text(json.dumps(proof) + "\n", "utf-8")
        origin = {**cut.manifest.origin, "member": cut.member.share}
        (folder / CARD).write_text(slice_card(plan, cut.mask, origin, out.name), "utf-8")
        return write_manifest(folder, origin, hash_weights=checksums)
