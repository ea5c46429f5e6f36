"""`sspcompile slice`: cut a mask out of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sspcompile.cli.options import (
    PLACE,
    host_option,
    json_option,
    model_option,
    overwrite_option,
    quiet_option,
    revision_option,
    say_left_out,
    workspace,
)

if TYPE_CHECKING:
    from sspcompile.checkpoint import Manifest
    from sspcompile.slicing.plan import SlicePlan


@click.command(
    short_help="Cut a mask out of a checkpoint, as a stream.",
    epilog="""\b
Examples:
  sspcompile slice --model ./Llama-3.1-8B --mask artifacts/mine/mask.json --out ./Llama-3.1-8B-mine
  sspcompile slice --model ./Qwen2.5-7B --mask mask.json --out ./served --host granite   (vLLM's native class)
  sspcompile slice --model ./big --mask mask.json --out ./small --max-shard-size 2GB --checksums
  sspcompile slice --from artifacts/mine --size 0.7 --out ./served   (a member of a nested artifact, repaired)
""",
)
@model_option
@revision_option
@click.option("--mask", type=PLACE, help="The mask.json that a build wrote.")
@click.option("--from", "nested", metavar="NESTED", help="A nested artifact (`build --nested`), instead of a mask.")
@click.option("--size", type=float, metavar="SHARE", help="With --from: the largest member of at most this share.")
@click.option("--out", "-o", required=True, type=PLACE, help="Folder to write.")
@host_option
@click.option("--max-shard-size", metavar="SIZE", help="Start a new file at this size; the source's shards by default.")
@click.option("--hard-link", is_flag=True, help="Share unchanged files with the source; then edit neither in place.")
@click.option("--checksums", is_flag=True, help="Put the sha256 of the weights into the manifest (reads them again).")
@click.option("--any-model", is_flag=True, help="Use a mask that was compiled for another model of the same shape.")
@overwrite_option
@click.option("--dry-run", is_flag=True, help="Check model and mask, print the plan, and write nothing.")
@json_option
@quiet_option
def slice_command(
    model: str | None,
    revision: str | None,
    mask: Path | None,
    nested: str | None,
    size: float | None,
    out: Path,
    host: str | None,
    max_shard_size: str | None,
    hard_link: bool,
    checksums: bool,
    any_model: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Cut what MASK removes out of a model's files: this stage of `build` by itself, without a repair; or take a member
    out of a nested artifact, with its own.

    No model is loaded: the bytes that stay are moved from file to file, whatever the size and the dtype. A mask that
    was compiled on one machine cuts the checkpoint on another. `sspcompile verify DIR` proves the result.
    """
    from sspcompile.checkpoint.locate import read_paths
    from sspcompile.checkpoint.replacing import refuse_existing
    from sspcompile.request.sizes import byte_size
    from sspcompile.slicing.hosts import named_host

    limit = byte_size(max_shard_size, "--max-shard-size")
    _refuse_mixed(mask, nested, size, only_mask=bool(model or revision or hard_link or any_model))
    refuse_existing(out, overwrite=overwrite, reads=(*read_paths(model), mask) if mask is not None else ())
    plan: SlicePlan
    write: Callable[..., Manifest]
    if mask is not None:
        from sspcompile.api.slice import open_cut, write_cut
        from sspcompile.checkpoint.locate import at_revision

        cut = open_cut(at_revision(model, revision), mask, host=named_host(host), any_model=any_model)
        plan, write = cut.plan, partial(write_cut, cut, link_unchanged=hard_link)
    else:
        from sspcompile.api.arguments import demand, named
        from sspcompile.api.members import cut_member, open_member

        found = demand(named(nested, workspace()), "nested", command="slice --from")
        member = open_member(found.folder, size if size is not None else 0.0, host=named_host(host))
        plan, write = member.plan, partial(cut_member, member)
    if not dry_run:
        from sspcompile.cli.progress import stages

        with stages(quiet, libraries=False) as progress:
            manifest = write(out, max_shard_bytes=limit, checksums=checksums, overwrite=overwrite, progress=progress)
        say_left_out(manifest.origin["left_out"], quiet=quiet)
    _print(plan, out, dry_run=dry_run, as_json=as_json, quiet=quiet)


def _refuse_mixed(mask: Path | None, nested: str | None, size: float | None, *, only_mask: bool) -> None:
    """Raise InputError unless a mask is given, or a nested artifact with a size."""
    from sspcompile.errors import InputError

    if (mask is None) == (nested is None):
        raise InputError(
            "`slice` takes a --mask, or a nested artifact.", hint="Give --mask FILE, or --from DIR --size S."
        )
    if (nested is None) != (size is None):
        raise InputError("--from and --size go together.", hint="As --from artifacts/mine --size 0.7.")
    if nested is not None and only_mask:
        raise InputError(
            "--model, --revision, --hard-link and --any-model are for a --mask.", hint="Leave them out with --from."
        )


def _print(plan: SlicePlan, out: Path, *, dry_run: bool, as_json: bool, quiet: bool) -> None:
    if as_json:
        from sspcompile.slicing.plan import plan_json

        click.echo(json.dumps({"folder": None if dry_run else str(out), **plan_json(plan)}, indent=1))
        return
    if dry_run:
        from sspcompile.cli.tables import print_plan

        print_plan(plan)
        return
    click.echo(f"Written to {out}: {plan.sliced.weight_bytes:,} bytes of weights, loads as {plan.host.architecture}")
    if not quiet:
        click.echo(f"Next: sspcompile verify {out}", err=True)
