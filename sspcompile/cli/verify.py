"""`sspcompile verify`: check an artifact against its manifest and against the masked dense model."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from sspcompile.cli.options import (
    json_option,
    model_option,
    placement_in,
    placement_options,
    quiet_option,
    revision_option,
    workspace,
)

if TYPE_CHECKING:
    from sspcompile.api.arguments import Named
    from sspcompile.model.placement import Placement


@click.command(
    short_help="Check an artifact's bytes, and its model against the dense one.",
    epilog="""\b
Examples:
  sspcompile verify
  sspcompile verify artifacts/chemistry-helpdesk --model /models/moved/elsewhere
  sspcompile verify ./Llama-3.1-70B-mine --layerwise        (a folder that `slice` wrote)
  sspcompile verify ./Qwen2.5-0.5B-mine                     (a folder that `trim` wrote)
""",
)
@click.argument("artifact", required=False)
@model_option
@revision_option
@click.option(
    "--layerwise/--whole",
    default=None,
    help="Hold one layer of each model at a time, or whole models; by default, what the free memory allows.",
)
@placement_options
@json_option
@quiet_option
def verify(
    artifact: str | None,
    model: str | None,
    revision: str | None,
    layerwise: bool | None,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Check every file's sha256 and every weight that was kept, load the model in a fresh process, and compare it with
    the masked dense model in float64.

    ARTIFACT is a build, or a folder that `sspcompile slice` or `trim` wrote; without it, the last build. Models that do
    not fit into memory are compared layer by layer, from their files. The dense model is looked for where the build
    found it; --model names another place. It is computed on the CPU, or on the CUDA device that --device names.
    """
    from sspcompile.api.arguments import named
    from sspcompile.api.verify import verify as run
    from sspcompile.checkpoint.locate import at_revision
    from sspcompile.cli.progress import stages

    placement, named_folder = placement_in(given), named(artifact, workspace())
    if named_folder.kind == "trimmed":
        _verify_trimmed(named_folder, at_revision(model, revision), placement, as_json=as_json, quiet=quiet)
        return
    with stages(quiet) as progress:
        found = run(named_folder, at_revision(model, revision), progress, layerwise=layerwise, placement=placement)
    manifest, parity = found.manifest, found.parity
    if as_json:
        click.echo(json.dumps({"files": len(manifest.files), **asdict(parity), "relative": parity.relative}))
        return
    click.echo(f"{named_folder.folder}: {len(manifest.files)} files match their manifest")
    click.echo(
        f"{parity.prompts} prompts: copied weights are the source's, bit for bit; largest logit difference "
        f"{parity.relative:.1e} of the scale in {parity.dtype}, "
        + ("same next tokens, layer by layer" if parity.layerwise else "same greedy text")
    )


def _verify_trimmed(found: Named, model: str | None, placement: Placement, *, as_json: bool, quiet: bool) -> None:
    from sspcompile.api.trim import verify_trimmed
    from sspcompile.cli.progress import stages

    with stages(quiet) as progress:
        manifest, proof = verify_trimmed(found, found.dense(model), progress, placement=placement)
    if as_json:
        click.echo(json.dumps({"files": len(manifest.files), **asdict(proof)}))
        return
    click.echo(f"{found.folder}: {len(manifest.files)} files match their manifest")
    click.echo(proof.told)
