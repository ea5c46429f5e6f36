"""`sspcompile export`: an artifact in the form that a runtime takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sspcompile.cli.options import here, host_option, json_option, overwrite_option, quiet_option, say_left_out

if TYPE_CHECKING:
    from sspcompile.export.onnx import Blocks, Exported, Precision

FORMATS = ("hf", "onnx")
ONNX_ONLY = (
    "precision",
    "block_size",
    "accuracy_level",
    "activations",
    "keep_embeddings",
    "context_length",
    "last_logits",
    "hard_link",
    "model",
)


@click.command(
    short_help="Write an artifact in the form that a runtime takes.",
    epilog="""\b
Examples:
  sspcompile export
  sspcompile export artifacts/chemistry-helpdesk --format hf --out ./served/chemistry
  sspcompile export artifacts/qwen-desk --host seed_oss   (a uniform Qwen2 for vLLM's native class)
  sspcompile export --format onnx
  sspcompile export artifacts/qwen-desk --format onnx --precision int4 --out ./served/qwen-int4
  sspcompile export --format onnx --model ./Qwen2.5-0.5B --out ./served/dense   (a checkpoint as it is)
""",
)
@click.argument("artifact", required=False)
@click.option(
    "--format",
    "form",
    default="hf",
    show_default=True,
    metavar="[hf|onnx]",
    help="Write a model folder for transformers and vLLM (hf), or for ONNX Runtime and its genai (onnx).",
)
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Output folder (default exported/NAME-FORMAT).")
@host_option
@click.option(
    "--precision",
    metavar="[fp32|fp16|int8|int4]",
    help="ONNX: the numbers of the graph (fp32); int8 and int4 round matrices in blocks and cost quality.",
)
@click.option(
    "--block-size",
    type=click.Choice(["16", "32", "64", "128", "256"]),
    help="ONNX in int8 or int4: how many inputs of a matrix share a scale (32).",
)
@click.option(
    "--accuracy-level",
    type=click.Choice(["0", "1", "4"]),
    help="ONNX in int8 or int4: multiply in int8 (4, the default and fastest) or in floats (0, 1).",
)
@click.option(
    "--activations",
    type=click.Choice(["fp32", "fp16"]),
    help="ONNX in int8 or int4: the numbers between the products (fp32); fp16 is what CUDA takes.",
)
@click.option(
    "--keep-embeddings",
    is_flag=True,
    help="ONNX in int8 or int4: leave a table that is embedding and head at once in floats for the former.",
)
@click.option(
    "--context-length",
    type=click.IntRange(min=1),
    metavar="N",
    help="ONNX: make the graph for N positions instead of all that the model has.",
)
@click.option(
    "--last-logits",
    is_flag=True,
    help="ONNX: compute the logits of the last token alone, which is all that generating needs: less time "
    "and memory for long prompts. Such an export cannot score texts.",
)
@click.option("--hard-link", is_flag=True, help="ONNX: share unchanged weight files with the source.")
@click.option("--model", "-m", metavar="MODEL", help="ONNX: export this checkpoint as it is instead of an artifact.")
@overwrite_option
@json_option
@quiet_option
def export(
    artifact: str | None,
    form: str,
    out: Path | None,
    host: str | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    **onnx: object,
) -> None:
    """Write an artifact's model with a model card and a manifest; without ARTIFACT, the last build's.

    An onnx export is run before it is published: texts of the artifact, alone and in a padded batch, must come out as
    transformers computes them. int8 and int4 change them by design; what that costs is printed.
    """
    from sspcompile.errors import InputError
    from sspcompile.workspace import Workspace

    if form not in FORMATS:
        raise InputError(f"There is no export format {form!r}.", hint=f"Accepted: {', '.join(FORMATS)}.")
    if form == "onnx":
        _refuse(host, "--host", "hf")
        _to_onnx(artifact, out, overwrite, as_json, quiet, onnx)
        return
    for name in ONNX_ONLY:
        _refuse(onnx[name], "--" + name.replace("_", "-"), "onnx")
    workspace = Workspace(here())
    folder = workspace.find(artifact)
    out = out or workspace.exported / f"{folder.name}-{form}"
    from sspcompile.export.hf import export_hf
    from sspcompile.slicing.hosts import named_host

    manifest = export_hf(folder, out, host=named_host(host), overwrite=overwrite)
    _say(folder, out, {name: entry["size"] for name, entry in manifest.files.items()}, as_json, {})


def _refuse(value: object, option: str, form: str) -> None:
    from sspcompile.errors import InputError

    if value:
        raise InputError(f"{option} belongs to --format {form}.", hint=f"Leave it out, or add --format {form}.")


def _to_onnx(
    artifact: str | None, out: Path | None, overwrite: bool, as_json: bool, quiet: bool, onnx: dict[str, object]
) -> None:
    from sspcompile.checkpoint.publish import refuse_existing
    from sspcompile.cli.progress import stages
    from sspcompile.errors import InputError
    from sspcompile.workspace import Workspace

    workspace = Workspace(here())
    model = onnx["model"]
    if model is not None and artifact is not None:
        raise InputError("ARTIFACT and --model exclude each other.", hint="Name one of them.")
    precision, blocks = _rounding(onnx)
    from sspcompile.api.exporting import of_artifact, of_checkpoint, to_onnx

    folder = Path(str(model)) if model is not None else workspace.find(artifact)
    out = out or workspace.exported / f"{folder.name}-onnx{'' if precision.name == 'fp32' else '-' + precision.name}"
    refuse_existing(out, overwrite=overwrite)
    with stages(quiet) as progress:
        source = of_artifact(folder) if model is None else of_checkpoint(str(model))
        done = to_onnx(
            source,
            out,
            precision,
            blocks=blocks,
            positions=onnx["context_length"],
            last_logits=bool(onnx["last_logits"]),
            link=bool(onnx["hard_link"]),
            overwrite=overwrite,
            progress=progress,
        )
    sizes = {name: entry["size"] for name, entry in done.manifest.files.items()}
    _say(folder, out, sizes, as_json, _measured(done, precision))
    if model is not None:
        say_left_out(source.origin["left_out"], quiet=quiet)
    if not as_json:
        click.echo(_sentence(done, precision))
    if not quiet:
        click.echo(f'Next: sspcompile run {out} --prompt "..."', err=True)


def _rounding(onnx: dict[str, object]) -> tuple[Precision, Blocks]:
    from dataclasses import replace

    from sspcompile.errors import InputError
    from sspcompile.export.onnx import PRECISIONS, Blocks

    name = str(onnx["precision"] or "fp32")
    if name not in PRECISIONS:
        raise InputError(f"There is no precision {name!r}.", hint=f"Accepted: {', '.join(PRECISIONS)}.")
    precision = PRECISIONS[name]
    if precision.bits is None:
        for option in ("block_size", "accuracy_level", "activations", "keep_embeddings"):
            if onnx[option]:
                raise InputError(
                    f"--{option.replace('_', '-')} is about rounded matrices.", hint="Add --precision int8 or int4."
                )
    elif onnx["activations"] == "fp16":
        precision = replace(precision, dtype="F16")
    size, level = onnx["block_size"] or Blocks.size, onnx["accuracy_level"] or Blocks.accuracy_level
    return precision, Blocks(int(str(size)), int(str(level)), bool(onnx["keep_embeddings"]))


def _measured(done: Exported, precision: Precision) -> dict[str, object]:
    from dataclasses import asdict

    agreement = done.agreement
    return {"precision": precision.name, "agreement": {**asdict(agreement), "relative": agreement.relative}}


def _sentence(done: Exported, precision: Precision) -> str:
    a = done.agreement
    if precision.gate is not None:
        return (
            f"{a.texts} texts came out as in transformers: logits within {a.relative:.1e} of their scale, "
            f"{a.new_tokens} greedy tokens of each {'the same' if a.same_text else 'with small differences'}."
        )
    return (
        f"Rounding to {precision.name} costs {a.mean_kl:.4f} nats per token against fp32 on {a.texts} texts; "
        f"the next token is the same at {a.top1_agreement:.1%} of their positions."
    )


def _say(folder: Path, out: Path, sizes: dict[str, int], as_json: bool, more: dict[str, object]) -> None:
    if as_json:
        click.echo(json.dumps({"folder": str(out), "files": sizes, **more}))
        return
    click.echo(f"Exported {folder} to {out} ({sum(sizes.values()):,} bytes)")
