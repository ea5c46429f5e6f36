"""`sspcompile trim`: keep the part of the vocabulary that a deployment reads and writes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sspcompile.cli.options import (
    PLACE,
    build_option,
    json_option,
    model_option,
    overwrite_option,
    placement_in,
    placement_options,
    quiet_option,
    revision_option,
    say_left_out,
    scenario_option,
    workspace,
)

if TYPE_CHECKING:
    from sspcompile.api.trim import TrimOutcome
    from sspcompile.trimming.judging import Judged


@click.command(
    short_help="Keep the part of the vocabulary that a deployment reads and writes.",
    epilog="""\b
Examples:
  sspcompile trim --scenario prompts.jsonl --model ./Qwen2.5-0.5B-Instruct --out ./Qwen2.5-0.5B-mine
  sspcompile trim --scenario support-desk --model ./Llama-3.2-1B-Instruct --tokens 32768 --out ./Llama-mine
  sspcompile build --scenario prompts.jsonl --model ./Qwen2.5-0.5B-mine --max-loss 0.03   (then heads and channels)
  sspcompile verify ./Qwen2.5-0.5B-mine
""",
)
@scenario_option
@model_option
@revision_option
@click.option("--tokens", type=click.IntRange(min=1), metavar="N", help="Keep at most so many tokens.")
@click.option(
    "--max-loss",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="SHARE",
    help="Keep as few tokens as lose at most this share of the next tokens, and of those read, on texts of the "
    "scenario that choose nothing.  [default: 0.01]",
)
@click.option(
    "--max-loss-off",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="SHARE",
    help="And at most this share on texts of all domains; 0.5 for a deployment that meets none.  [default: 0.05]",
)
@click.option("--out", "-o", required=True, type=PLACE, help="Folder to write.")
@build_option("pools")
@build_option("chat_template")
@build_option("raw")
@build_option("max_tokens")
@build_option("continuation_tokens")
@build_option("seed")
@placement_options
@overwrite_option
@json_option
@quiet_option
def trim(
    scenario: str | None,
    tokens: int | None,
    max_loss: float | None,
    max_loss_off: float | None,
    out: Path,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Write the model with fewer tokens: the rows of its embedding and of its head that a scenario needs.

    Of a small model the vocabulary is a fifth to a half of the weights. A text that holds a token which went is read
    and written in smaller pieces, down to bytes, so every text can still be read and written. On texts that need no
    such token the model computes what it did; this is proven before anything is published. The folder is an ordinary
    checkpoint: `build`, `export` and every runtime take it.
    """
    from sspcompile.api.reads import refuse_output
    from sspcompile.api.trim import TrimBounds, refuse_untrimmable
    from sspcompile.api.trim import trim as run
    from sspcompile.checkpoint.source import not_carried
    from sspcompile.cli.progress import stages
    from sspcompile.model.dense import open_dense
    from sspcompile.request.options import NAMES
    from sspcompile.request.request import read_request

    bounds = TrimBounds.of(tokens=tokens, max_loss=max_loss, max_loss_off=max_loss_off)
    placement = placement_in(given)
    request = read_request(scenario, {name: given[name] for name in NAMES if name in given}, os.environ)
    refuse_output(out, scenario, request.options, overwrite=overwrite)
    dense = open_dense(request.options.source)
    refuse_untrimmable(dense)
    with stages(quiet) as progress:
        outcome = run(
            request, dense, out, workspace(), progress, bounds=bounds, overwrite=overwrite, placement=placement
        )
    if as_json:
        found = outcome.to_json()
        click.echo(json.dumps({"folder": str(out), **{key: found[key] for key in found if key != "kept"}}, indent=1))
        return
    _print(outcome)
    if not quiet:
        say_left_out(not_carried(dense.checkpoint.path), quiet=quiet)
        click.echo(f"Next: sspcompile build --model {out} --scenario ..., or serve it as it is", err=True)


def _print(outcome: TrimOutcome) -> None:
    from sspcompile.api.trim import PLACES

    before, after = outcome.parameters
    sizes = f"{after / 1e6:,.1f} of {before / 1e6:,.1f} M parameters ({after / before:.1%})"
    click.echo(f"{outcome.folder}: {len(outcome.kept):,} of {outcome.of:,} tokens, {sizes}")
    for name, one in outcome.judged.items():
        click.echo(f"  {PLACES[name]:<16} {_told(one)}")
    click.echo(f"  {'proven':<16} {outcome.proof.told}")


def _told(one: Judged) -> str:
    parts = [f"{one.tokens.changed:.1%} of next tokens gone", f"{one.tokens.read:.1%} read in pieces"]
    if one.perplexity is not None and one.length is not None:
        low, high = one.perplexity.low, one.perplexity.high
        interval = f" ({low:.3g} to {high:.3g})" if low is not None and high is not None else ""
        parts += [f"perplexity {one.perplexity.value:.3f}x{interval}", f"length {one.length.value:.2f}x"]
    return f"{', '.join(parts)}; {one.texts} texts"
