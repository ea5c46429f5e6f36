"""`sspcompile verify`: check an artifact against its manifest and against the masked dense model."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from sspcompile.cli.options import here, json_option, model_option, quiet_option


@click.command(
    short_help="Check an artifact's bytes, and its model against the dense one.",
    epilog="""\b
Examples:
  sspcompile verify
  sspcompile verify artifacts/chemistry-helpdesk --model /models/moved/elsewhere
"""
)
@click.argument("artifact", required=False)
@model_option
@json_option
@quiet_option
def verify(artifact: str | None, model: str | None, as_json: bool, quiet: bool) -> None:
    """Check every file's sha256, load the model in a fresh process, and compare it with the masked dense model.

    The dense model is looked for where the build found it; --model names another place.
    """
    from sspcompile.cli.progress import stages
    from sspcompile.pipeline.verifying import verify as run
    from sspcompile.workspace import Workspace

    folder = Workspace(here()).find(artifact)
    with stages(quiet) as progress:
        manifest, parity = run(folder, model, progress)
    if as_json:
        click.echo(json.dumps({"files": len(manifest.files), **asdict(parity), "relative": parity.relative}))
        return
    click.echo(f"{folder}: {len(manifest.files)} files match their manifest")
    click.echo(
        f"{parity.prompts} prompts: largest logit difference {parity.max_difference:.2e} "
        f"({parity.relative:.1e} of the scale), same greedy text"
    )
