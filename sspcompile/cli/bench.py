"""`sspcompile bench`: the dense model against the sliced ones."""

from __future__ import annotations

import json
from typing import Any

import click

from sspcompile.cli.drafts import benched_as_nested
from sspcompile.cli.options import (
    COUNTS,
    json_option,
    model_option,
    placement_in,
    placement_options,
    quiet_option,
    revision_option,
    workspace,
)
from sspcompile.cli.servers import measure_servers, refuse_without_servers, server_options


@click.command(
    short_help="Measure artifacts against their dense model, or servers.",
    epilog="""\b
Examples:
  sspcompile bench --quick
  sspcompile bench artifacts/chemistry-helpdesk --prompt-tokens 128,512 --new-tokens 64 --batch 1,8
  sspcompile bench artifacts/chemistry-helpdesk --runtimes hf,onnx
  sspcompile bench exported/chemistry-helpdesk-onnx-int4
  sspcompile bench exported/chemistry-helpdesk-gguf-q4_0
  sspcompile bench keep-half keep-third --json > samples.json
  sspcompile bench artifacts/nested --new-tokens 128                 (a small member drafts for the whole)
  sspcompile bench --server dense=http://localhost:8000 --server cut=http://localhost:8001
""",
)
@click.argument("artifacts", metavar="[ARTIFACT ...]", nargs=-1)
@click.option(
    "--against",
    metavar="WHAT",
    default="dense",
    show_default=True,
    help="Compare with the dense model, or with this artifact, export or model folder.",
)
@model_option
@revision_option
@click.option(
    "--runtimes",
    metavar="LIST",
    default="hf",
    show_default=True,
    help="Run artifacts in transformers (hf), in ONNX Runtime (onnx), in llama.cpp (gguf), or in several (hf,onnx).",
)
@click.option("--quick", is_flag=True, help="Few tokens and repeats: seconds instead of minutes on a small model.")
@click.option("--prompt-tokens", type=COUNTS, metavar="N[,N...]", help="Tokens of each prompt (512).")
@click.option("--new-tokens", type=click.IntRange(2), metavar="N", help="Tokens decoded after each prompt (64).")
@click.option("--batch", type=COUNTS, metavar="N[,N...]", help="Sequences at once (1).")
@click.option(
    "--repeats",
    type=click.IntRange(1),
    metavar="N",
    help="Counted trials of each contender under each load, over all processes (24; 32 with --quick).",
)
@click.option(
    "--processes",
    "sessions",
    type=click.IntRange(1),
    metavar="N",
    help="Fresh processes of each contender (8; 16 with --quick); intervals are taken over them.",
)
@placement_options
@click.option("--fresh", is_flag=True, help="Begin anew instead of going on where an interrupted run stopped.")
@server_options
@json_option
@quiet_option
@click.pass_context
def bench(
    context: click.Context,
    artifacts: tuple[str, ...],
    against: str,
    model: str | None,
    revision: str | None,
    runtimes: str,
    quick: bool,
    fresh: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Measure prefill, decode, memory and KV bytes of artifacts against their dense model, and write their reports.

    Each contender runs in processes of its own, in alternation, with equal threads; every sample is kept in
    bench.json. ARTIFACT may also be an exported folder. Without one, the last build is measured. Models compute in
    the numbers that they are stored in unless --dtype says otherwise (in transformers alone); --memory says for how
    much the largest context and batch are worked out, by default for all that the device has.

    Of a nested artifact it measures the smallest member as a draft for the whole model: the share of proposed tokens
    that is accepted, and greedy decoding with the draft against greedy decoding alone.

    With --server it measures what serves the models instead: time to first token, inter-token latency and throughput,
    over HTTP. Nothing is sent but prompts of plain words, and the key where there is one.
    """
    if context.params["servers"]:
        measure_servers(context)
        return
    refuse_without_servers(context)
    placement = placement_in(given)
    if benched_as_nested(context):
        return
    from sspcompile.api.bench import BenchRequest
    from sspcompile.api.bench import bench as run
    from sspcompile.checkpoint.locate import at_revision
    from sspcompile.cli.progress import stages

    request = BenchRequest.of(
        quick=quick,
        runtimes=_runtimes(runtimes),
        **{name: given[name] for name in ("batch", "prompt_tokens", "new_tokens", "repeats", "sessions")},
        threads=placement.threads,
        device=placement.device,
        memory=placement.memory,
        dtype=placement.dtype,
        device_map=placement.device_map,
    )
    place = at_revision(model, revision)
    with stages(quiet) as progress:
        done = run(artifacts or (None,), request, workspace(), progress, against=against, model=place, fresh=fresh)
    if as_json:
        click.echo(json.dumps(done.result.to_json(), indent=1))
        return
    from sspcompile.cli.tables import print_report

    print_report(done.report, only=("findings", "latency"))
    for folder in done.artifacts:
        click.echo(f"Report: {folder / 'report.html'}", err=True)


def _runtimes(given: str) -> tuple[str, ...]:
    from sspcompile.api.bench import RUNTIMES
    from sspcompile.errors import InputError

    wanted = tuple(dict.fromkeys(part.strip() for part in given.split(",")))
    for name in wanted:
        if name not in RUNTIMES:
            raise InputError(
                f"There is no runtime {name!r}.", hint=f"Accepted: {', '.join(RUNTIMES)}, or several of them."
            )
    return wanted
