"""`sspcompile bench` of a nested artifact: which options go with it, and how the result is shown."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from sspcompile.cli.options import placement_in, refuse_given, workspace

if TYPE_CHECKING:
    from sspcompile.bench.drafting import DraftResult

# What of the options of `bench` is about one model against another in processes of their own.
APART = {"against", "model", "revision", "runtimes", "prompt_tokens", "batch", "sessions", "fresh"}


def benched_as_nested(context: click.Context) -> bool:
    """Measure and print the draft of a nested artifact, if one is named; False for everything else.

    Raises InputError for options that do not go with it.
    """
    from sspcompile.api.arguments import named

    artifacts = context.params["artifacts"]
    if len(artifacts) > 1:
        return False
    found = named(artifacts[0] if artifacts else None, workspace())
    if found.kind != "nested":
        return False
    hint = f"Cut a member out and measure that: `sspcompile slice --from {found.folder} --size 0.8 --out DIR`."
    refuse_given(context, APART, "does not go with a nested artifact", hint)
    from sspcompile.api.drafts import bench_drafts
    from sspcompile.cli.progress import stages

    given = context.params
    with stages(given["quiet"]) as progress:
        done = bench_drafts(
            found,
            **{name: given[name] for name in ("quick", "new_tokens", "repeats")},
            placement=placement_in(given),
            progress=progress,
        )
    if given["as_json"]:
        click.echo(json.dumps(done.to_json(), indent=1))
    else:
        print_drafts(done)
    return True


def print_drafts(done: DraftResult) -> None:
    """A row per text, then what they come to."""
    from rich.console import Console
    from rich.table import Table

    from sspcompile.report.format import percent, with_interval

    console = Console()
    table = Table(
        title=f"Member {done.draft:g} as a draft for the whole model, {done.proposed_at_once} tokens at a time, "
        f"{done.new_tokens} tokens a text, on {done.device} in {done.dtype} with {done.threads} threads",
        title_justify="left",
    )
    for name in ("prompt", "proposed", "accepted", "passes of the whole", "same text"):
        table.add_column(name, justify="right")
    for one in done.texts:
        figures = (one.prompt_tokens, one.proposed, one.accepted, one.passes)
        table.add_row(*(f"{figure:,}" for figure in figures), "yes" if one.same_text else "no")
    console.print(table)
    plain, assisted = done.tokens_per_second
    console.print(f"Accepted: {with_interval(done.acceptance, percent)} of the proposed tokens.")
    console.print(
        f"Greedy decoding: {plain:.1f} tokens/s alone, {assisted:.1f} with the draft; as a ratio "
        f"{with_interval(done.speedup)}: {_verdict(done)}."
    )
    if done.same_texts < len(done.texts):
        console.print(
            f"{len(done.texts) - done.same_texts} of {len(done.texts)} texts differ: several tokens in one pass are "
            f"rounded otherwise than one, and {done.dtype} does not tell their likeliest apart."
        )


def _verdict(done: DraftResult) -> str:
    speedup = done.speedup
    if speedup.low is None or speedup.high is None:
        return "too few texts to say"
    if speedup.low <= 1 <= speedup.high:
        return "no measurable change"
    return "a gain" if speedup.value > 1 else "a loss"
