"""`sspcompile export`: an artifact in the form that a runtime takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sspcompile.cli.options import (
    PLACE,
    host_option,
    json_option,
    overwrite_option,
    placement_in,
    placement_options,
    quiet_option,
    revision_option,
    say_left_out,
    workspace,
)

if TYPE_CHECKING:
    from sspcompile.api.export import Published
    from sspcompile.export.agreement import Agreement
    from sspcompile.export.gguf.publish import GgufExport
    from sspcompile.export.onnx import Precision
    from sspcompile.export.refitted import Refit


NOTICEABLE_BYTES, NOTICEABLE_SHARE = 1_000_000, 0.1


@click.command(
    short_help="Write an artifact in the form that a runtime takes.",
    epilog="""\b
Examples:
  sspcompile export
  sspcompile export artifacts/chemistry-helpdesk --format hf --out ./served/chemistry
  sspcompile export artifacts/qwen-desk --host granite   (a uniform Qwen2 for vLLM's native class)
  sspcompile export --format onnx
  sspcompile export artifacts/qwen-desk --format onnx --precision int4 --out ./served/qwen-int4
  sspcompile export --format onnx --model ./Qwen2.5-0.5B --out ./served/dense   (a checkpoint as it is)
  sspcompile export artifacts/nested --format onnx   (a graph for every size, over one file of weights)
  sspcompile export artifacts/nested --format gguf --size 0.8
  sspcompile export --format gguf
  sspcompile export artifacts/chemistry-helpdesk --format gguf --type q4_k_m
""",
)
@click.argument("artifact", required=False)
@click.option(
    "--format",
    "form",
    default="hf",
    show_default=True,
    metavar="[hf|onnx|gguf]",
    help="Write a model folder for transformers and vLLM (hf), for ONNX Runtime and its genai (onnx), or a file for "
    "llama.cpp and Ollama (gguf).",
)
@click.option("--out", "-o", type=PLACE, help="Output folder (default exported/NAME-FORMAT).")
@host_option
@click.option(
    "--precision",
    metavar="[fp32|fp16|int8|int4]",
    help="ONNX: the numbers of the graph (fp32); int8 and int4 round matrices in blocks and cost quality.",
)
@click.option(
    "--block-size",
    type=click.Choice([16, 32, 64, 128, 256]),
    help="ONNX in int8 or int4: how many inputs of a matrix share a scale (32).",
)
@click.option(
    "--accuracy-level",
    type=click.Choice([0, 1, 4]),
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
    type=click.IntRange(min=2),
    metavar="N",
    help="ONNX: make the graph for texts of at most N tokens instead of all positions that the model has.",
)
@click.option(
    "--last-logits",
    is_flag=True,
    help="ONNX: compute the logits of the last token alone, which is all that generating needs: less time "
    "and memory for long prompts. Such an export cannot score texts.",
)
@click.option("--hard-link", is_flag=True, help="ONNX: share unchanged weight files with the source.")
@click.option(
    "--type",
    metavar="TYPE",
    help="GGUF: f32, f16 or bf16 (by default as the model is stored), or rounded: q8_0 and q4_0 anywhere, q6_k, "
    "q5_k_m, q4_k_m, q4_k_s and q3_k_m by llama.cpp's quantiser (the extra [gguf]).",
)
@click.option(
    "--model", "-m", metavar="MODEL", help="ONNX, GGUF: export this checkpoint as it is instead of an artifact."
)
@click.option(
    "--size",
    type=float,
    metavar="SHARE",
    help="Of a nested artifact: the largest member of at most this share; without it, ONNX takes all of them.",
)
@revision_option
@placement_options
@overwrite_option
@json_option
@quiet_option
def export(
    artifact: str | None,
    form: str,
    out: Path | None,
    host: str | None,
    model: str | None,
    revision: str | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Write an artifact's model with a model card and a manifest; without ARTIFACT, the last build's.

    An onnx export is run before it is published: texts of the artifact, alone and in a padded batch, must come out as
    transformers computes them on the CPU in fp32, within --memory and --threads. int8 and int4 change them by design;
    what that costs is printed. So is a gguf export, by llama.cpp, where that is installed; where it is not, the export
    is marked unproven.
    """
    from sspcompile.errors import InputError

    if model is not None and form == "hf":
        raise InputError(
            "--model belongs to --format onnx or gguf.", hint="Leave it out, or add --format onnx or --format gguf."
        )
    if model is not None and artifact is not None:
        raise InputError("ARTIFACT and --model exclude each other.", hint="Name one of them.")
    from sspcompile.api.arguments import named
    from sspcompile.api.export import GGUF_ONLY, ONNX_ONLY, ExportRequest
    from sspcompile.api.nested_export import export_any
    from sspcompile.checkpoint.locate import at_revision
    from sspcompile.cli.progress import stages

    placement = placement_in(given)
    request = ExportRequest(form, host, **{name: given[name] for name in (*ONNX_ONLY, *GGUF_ONLY, "size")})
    request.check()
    place = at_revision(model, revision)
    found = named(artifact if place is None else place, workspace())
    with stages(quiet) as progress:
        done = export_any(found, request, workspace(), progress, out=out, overwrite=overwrite, placement=placement)
    measured = _measured(done)
    _say_tables(done)
    if found.kind == "model":
        say_left_out(done.left_out, quiet=quiet)
    if as_json:
        refit = {"refit": {"precision": done.refit.precision, "taken": done.refit.taken}} if done.refit else {}
        click.echo(json.dumps({"folder": str(done.folder), "files": done.files, **measured, **refit}))
        return
    click.echo(f"Exported {found.folder} to {done.folder} ({sum(done.files.values()):,} bytes)")
    _say_agreement(done, quiet=quiet)


def _say_agreement(done: Published, *, quiet: bool) -> None:
    """What was found before publishing, and on stderr what to type next."""
    from sspcompile.model.llama_session import MODEL

    if done.gguf is not None:
        click.echo(_gguf_sentence(done.gguf))
        if done.gguf.kind.name == "bf16" and not quiet:
            click.echo("Note: llama.cpp multiplies bf16 weights in bf16. --type f16 is as small and closer.", err=True)
        following = f"llama-server -m {done.folder / MODEL}"
    elif done.agreement is not None and done.precision is not None:
        click.echo(_sentence(done.agreement, done.precision))
        following = f'sspcompile run {done.folder} --prompt "..."'
    else:
        return
    if done.refit is not None:
        click.echo(_refit_sentence(done.refit))
    if not quiet:
        click.echo(f"Next: {following}", err=True)


def _refit_sentence(refit: Refit) -> str:
    """Whether what a build refitted for a rounding is in an export."""
    if refit.taken:
        return (
            f"Rounded are o_proj and down_proj as the build refitted them for {refit.precision}: they aim at the dense "
            "model, so that the cut in transformers differs by more than rounding."
        )
    return f"The build refitted o_proj and down_proj for {refit.precision}; this export has the model's own."


def _measured(done: Published) -> dict[str, object]:
    from dataclasses import asdict

    if done.gguf is not None:
        told = {"type": done.gguf.kind.name, "architecture": done.gguf.architecture}
        found = {name: getattr(done.gguf, name) for name in ("structure", "agreement")}
        agreements = {name: one and {**asdict(one), "relative": one.relative} for name, one in found.items()}
        return {
            **told,
            "context_length": done.gguf.context_length,
            "proven": done.gguf.agreement is not None,
            **agreements,
        }
    if done.agreement is None or done.precision is None:
        return {}
    agreement = {**asdict(done.agreement), "relative": done.agreement.relative}
    return {"precision": done.precision.name, "context_length": done.context_length, "agreement": agreement}


def _say_tables(done: Published) -> None:
    """Say on stderr what the tables of a long context take, where that is a noticeable part of an export."""
    tables, context, total = done.table_bytes or 0, done.context_length, sum(done.files.values())
    if context and tables >= NOTICEABLE_BYTES and tables >= NOTICEABLE_SHARE * total:
        click.echo(
            f"Note: {tables:,} of the {total:,} bytes are rotary tables for texts of up to {context:,} tokens, "
            f"{tables // context:,} bytes for each. Where shorter texts will do, give --context-length N.",
            err=True,
        )


def _sentence(a: Agreement, precision: Precision) -> str:
    if precision.gate is not None:
        own = f" Rounding alone makes {a.rounding:.1e} in transformers." if a.rounding is not None else ""
        return (
            f"{a.texts} texts came out as in transformers: logits within {a.relative:.1e} of their scale, "
            f"{a.new_tokens} greedy tokens of each {'the same' if a.same_text else 'with small differences'}.{own}"
        )
    return (
        f"Rounding to {precision.name} costs {a.mean_kl:.4f} nats per token against fp32 on {a.texts} texts; "
        f"the next token is the same at {a.top1_agreement:.1%} of their positions, those of the prompts included."
    )


def _gguf_sentence(done: GgufExport) -> str:
    kind, a, exact = done.kind.name, done.agreement, done.structure
    if a is None or exact is None:
        return (
            f"UNPROVEN: llama.cpp is not installed here, so nobody has loaded this {kind} file of architecture "
            f"{done.architecture}. pip install 'sspcompile[gguf]' and export again to have it compared first."
        )
    text = "the same" if exact.same_text else "with small differences"
    found = (
        f"llama.cpp loads it as {done.architecture}; in fp32 {exact.texts} texts came out as in transformers: logits "
        f"within {exact.relative:.1e} of their scale, {exact.new_tokens} greedy tokens of each {text}."
    )
    if exact is a:
        return found
    return (
        f"{found} In {kind} that costs {a.mean_kl:.4f} nats per token; the next token is the same at "
        f"{a.top1_agreement:.1%} of their positions, those of the prompts included."
    )
