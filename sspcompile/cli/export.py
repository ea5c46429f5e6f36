"""`sspcompile export`: an artifact in the form that a runtime takes."""

from __future__ import annotations

import json
from pathlib import Path

import click

from sspcompile.cli.options import here, host_option, json_option, overwrite_option

FORMATS = ("hf",)


@click.command(
    short_help="Write an artifact in the form that a runtime takes.",
    epilog="""\b
Examples:
  sspcompile export
  sspcompile export artifacts/chemistry-helpdesk --format hf --out ./served/chemistry
  sspcompile export artifacts/qwen-desk --host seed_oss   (a uniform Qwen2 for vLLM's native class)
"""
)
@click.argument("artifact", required=False)
@click.option("--format", "form", default="hf", show_default=True, metavar="[hf]", help="Form; hf is a model folder.")
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Output folder (default exported/NAME-FORMAT).")
@host_option
@overwrite_option
@json_option
def export(
    artifact: str | None, form: str, out: Path | None, host: str | None, overwrite: bool, as_json: bool
) -> None:
    """Write an artifact's model with a model card and a manifest; without ARTIFACT, the last build's."""
    from sspcompile.errors import InputError
    from sspcompile.workspace import Workspace

    if form not in FORMATS:
        raise InputError(f"There is no export format {form!r}.", hint=f"Accepted: {', '.join(FORMATS)}.")
    workspace = Workspace(here())
    folder = workspace.find(artifact)
    out = out or workspace.exported / f"{folder.name}-{form}"
    from sspcompile.export.hf import export_hf
    from sspcompile.slicing.hosts import named_host

    manifest = export_hf(folder, out, host=named_host(host), overwrite=overwrite)
    if as_json:
        click.echo(json.dumps({"folder": str(out), "files": {k: v["size"] for k, v in manifest.files.items()}}))
        return
    click.echo(f"Exported {folder} to {out} ({sum(v['size'] for v in manifest.files.values()):,} bytes)")
