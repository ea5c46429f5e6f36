"""`sspcompile bench --server`: what it takes beside the other options of `bench`, and how its result is shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sspcompile.cli.options import COUNTS, PLACE, overwrite_option, refuse_given

if TYPE_CHECKING:
    from sspcompile.bench.ratios import Ratio
    from sspcompile.bench.serving import ServerLoadResult, ServersResult

Command = TypeVar("Command", bound=Callable[..., Any])

SERVER_OPTIONS = (
    click.option(
        "--server",
        "servers",
        metavar="[NAME=]URL",
        multiple=True,
        help="Measure this OpenAI-compatible server instead, over HTTP. Give it once for each; the others are compared "
        "with the first.",
    ),
    click.option(
        "--served-model",
        "models",
        metavar="[NAME=]MODEL",
        multiple=True,
        help="The model to ask for there, where a server has several.",
    ),
    click.option("--concurrency", type=COUNTS, metavar="N[,N...]", help="Requests sent to a server at once (1,4,16)."),
    click.option(
        "--max-seconds",
        "seconds",
        type=click.FloatRange(1),
        metavar="S",
        help="Stop asking servers after so many seconds in all (600), and show the rounds that had ended.",
    ),
    click.option("--chat", is_flag=True, help="Ask servers through /chat/completions instead of /completions."),
    click.option(
        "--stop-at-eos",
        is_flag=True,
        help="Let servers end a text early, for those that refuse the field ignore_eos; told tokens are what came.",
    ),
    click.option(
        "--api-key",
        metavar="KEY",
        envvar="OPENAI_API_KEY",
        help="Sent to every --server as bearer, by default the variable OPENAI_API_KEY; --api-key '' sends none.",
    ),
    click.option("--out", "-o", type=PLACE, help="Write what servers did to this JSON file."),
    overwrite_option,
)
# What of the other options of `bench` means the same for servers.
SHARED = {"quick", "prompt_tokens", "new_tokens", "repeats", "as_json", "quiet"}


def server_options(command: Command) -> Command:
    """The options of `bench` that are about servers."""
    for option in reversed(SERVER_OPTIONS):
        command = option(command)
    return command


def refuse_without_servers(context: click.Context) -> None:
    """Raises InputError for options about servers where none is named."""
    refuse_given(context, _own(), "needs a --server", "Give --server URL, or leave it out.")


def measure_servers(context: click.Context) -> None:
    """Measure what --server names, and print it. Raises InputError for options that do not go with it."""
    others = {parameter.name for parameter in context.command.params} - _own() - SHARED
    refuse_given(context, others, "does not go with --server", "Measure either artifacts or servers.")
    from sspcompile.api.servers import ServerRequest, bench_servers, servers_of
    from sspcompile.cli.progress import stages

    given: Mapping[str, Any] = context.params
    request = ServerRequest.of(
        quick=given["quick"],
        **{name: given[name] for name in ("concurrency", "prompt_tokens", "new_tokens", "repeats", "seconds")},
        chat=given["chat"],
        stop_at_eos=given["stop_at_eos"],
    )
    servers = servers_of(given["servers"], given["models"])
    with stages(given["quiet"], libraries=False) as progress:
        result = bench_servers(
            servers,
            request,
            api_key=given["api_key"],
            out=given["out"],
            overwrite=given["overwrite"],
            progress=progress,
        )
    if given["as_json"]:
        click.echo(json.dumps(result.to_json(), indent=1))
    else:
        print_servers(result)
    if given["out"] is not None:
        click.echo(f"Samples: {given['out']}", err=True)


def _own() -> set[str | None]:
    made = click.command()(server_options(lambda: None))
    return {parameter.name for parameter in made.params}


def print_servers(result: ServersResult) -> None:
    """A table of medians, one of ratios where there are several servers, and what else must be known."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sspcompile.bench.metrics import SERVER_METRICS

    console = Console()
    table = Table(title=Text("Medians, with p10 to p90"), title_justify="left", header_style="")
    for header in ("load", "metric", *(server.name for server in result.servers)):
        table.add_column(Text(header), overflow="fold")
    for place, under in enumerate(result.servers[0].loads):
        for metric in SERVER_METRICS.values():
            cells = [_spread(server.loads[place], metric.name) for server in result.servers]
            table.add_row(under.load.label, metric.label, *map(Text, cells))
    console.print(table)
    if result.ratios:
        ratios = Table(title=Text("Improvement above 1 is good, 99 % intervals"), title_justify="left", header_style="")
        for header in ("load", "metric", "server", "improvement", "verdict"):
            ratios.add_column(header, overflow="fold")
        for ratio in result.ratios:
            ratios.add_row(*map(Text, _ratio(ratio)))
        console.print(ratios)
    for line in told(result):
        console.print(Text(line))


def _spread(under: ServerLoadResult, metric: str) -> str:
    from sspcompile.bench.metrics import SERVER_METRICS
    from sspcompile.report.format import quantity

    found, unit = under.metrics[metric], SERVER_METRICS[metric].unit
    return f"{quantity(found.median, unit)} ({quantity(found.p10, unit)} to {quantity(found.p90, unit)})"


def _ratio(ratio: Ratio) -> tuple[str, ...]:
    from sspcompile.bench.metrics import SERVER_METRICS
    from sspcompile.intervals import Estimate
    from sspcompile.report.format import with_interval

    improvement = with_interval(Estimate.of(ratio.improvement, ratio.improvement_interval))
    names = f"{ratio.contender} against {ratio.reference}"
    return ratio.load or "", SERVER_METRICS[ratio.metric].label, names, improvement, ratio.verdict


def told(result: ServersResult) -> list[str]:
    """Sentences: what was asked, of whom, and what came otherwise than it was asked for."""
    settings = result.settings
    lines = [
        f"{server.name}: {server.model} at {server.url}" + (f", by {server.software}." if server.software else ".")
        for server in result.servers
    ]
    lines.append(
        f"{result.rounds} rounds, the servers in turn, after {settings.warmup} that is not counted; no two prompts "
        "begin alike, so that no cache of prefixes answers them."
    )
    if result.rounds < settings.rounds:
        lines.append(f"STOPPED after {settings.seconds:g} s: {settings.rounds} rounds were asked for.")
    for server in result.servers:
        if counts := [count for under in server.loads for count in under.prompt_tokens]:
            lines.append(f"{server.name}: prompts of {_range(counts)} tokens, as it counts.")
        if not all(under.counted for under in server.loads):
            lines.append(f"{server.name}: it does not count tokens; the pieces of its streams were counted.")
        lines += [_fewer(server.name, under) for under in server.loads if under.fewer]
    return lines


def _fewer(name: str, under: ServerLoadResult) -> str:
    return (
        f"FEWER TOKENS: {name}, {under.load.label}: {under.fewer} of {len(under.new_tokens)} answers ended before the "
        f"{under.load.new_tokens} tokens that were asked for; they had {_range(under.new_tokens)}."
    )


def _range(values: Sequence[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"
