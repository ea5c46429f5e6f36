"""Tables of the commands that print plain values rather than a report."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from sspcompile.api.cost import Cost
    from sspcompile.criteria import Criterion
    from sspcompile.families import Geometry
    from sspcompile.nested.index import Nested
    from sspcompile.report import Report
    from sspcompile.slicing.frontier import Frontier
    from sspcompile.slicing.latency import LatencyTable
    from sspcompile.slicing.mask import HeadMask
    from sspcompile.slicing.measures import Serving
    from sspcompile.slicing.plan import SlicePlan

MEBI = 1 << 20
SHADES = " ░▒▓█"


def print_report(report: Report, *, as_json: bool = False, only: Collection[str] | None = None) -> None:
    """The report on stdout, as JSON or for people."""
    if as_json:
        from sspcompile.report.json import render_json

        print(render_json(report), end="")
        return
    from sspcompile.report.page import report_page
    from sspcompile.report.text import render_text

    render_text(report_page(report), Console(), only=only)


def print_members(name: str, nested: Nested, *, as_json: bool = False) -> None:
    """The sizes of a nested artifact and what each costs, as JSON or for people."""
    from sspcompile.report.members import members_json, members_page
    from sspcompile.report.text import render_text

    if as_json:
        print(members_json(nested), end="")
    else:
        render_text(members_page(name, nested), Console())


def print_plan(
    plan: SlicePlan, serving: Serving | None = None, *, by_layer: bool = False, table: LatencyTable | None = None
) -> None:
    """Sizes before and after, what a token takes by a `table`, and a verdict per runtime; with `by_layer` a row for
    every layer.
    """
    console = Console()
    sizes = Table(title=_plan_title(plan), title_justify="left")
    for name in ("", "dense", "sliced", "ratio"):
        sizes.add_column(name, justify="left" if not name else "right")
    g, narrowed = plan.geometry, _narrowed(plan)
    channels = f"channels of the {_mlps(g)}", g.layers * g.channels, g.mlps * sum(plan.widths), "{:,}"
    depth = [("layers", len(plan.layers), len(plan.staying), "{:,}")] if plan.removed else []
    memory = [] if serving is None else [(f"both for {serving} (MiB)", *(n / MEBI for n in plan.memory(serving)))]
    rows = (
        ("parameters", plan.dense.parameters, plan.sliced.parameters, "{:,}"),
        ("weights (MiB)", plan.dense.weight_bytes / MEBI, plan.sliced.weight_bytes / MEBI, "{:,.1f}"),
        *depth,
        *((channels,) if narrowed else ()),
        ("KV cache (bytes per token)", plan.dense.kv_bytes_per_token, plan.sliced.kv_bytes_per_token, "{:,}"),
        *((*row, "{:,.1f}") for row in memory),
        ("FLOPs per token", plan.dense.flops_per_token, plan.sliced.flops_per_token, "{:,}"),
        ("  and position of the context", plan.dense.flops_per_position, plan.sliced.flops_per_position, "{:,}"),
    )
    for label, dense, sliced, form in (*rows, *_token(plan, table)):
        sizes.add_row(label, form.format(dense), form.format(sliced), f"{sliced / dense:.3f}")
    console.print(sizes)
    _print_gone(plan, console)
    if narrowed:
        console.print(f"Heads are {plan.prunable_share:.1%} of the parameters, channels {plan.channel_share:.1%}.")
    elif not plan.removed:
        console.print(f"Attention is {plan.prunable_share:.1%} of the parameters; heads alone are no more than that.")
    rows_held = g.vocab * g.hidden * (1 if g.tied else 2) / plan.dense.parameters
    console.print(f"The vocabulary is {rows_held:.1%}; `sspcompile trim` takes from that.")
    verdicts = Table("runtime", "loads", "how, or why not")
    for verdict in plan.runtimes:
        verdicts.add_row(verdict.runtime, "yes" if verdict.loads else "no", verdict.reason)
    console.print(verdicts)
    if by_layer:
        console.print(_layers(plan))


def _print_gone(plan: SlicePlan, console: Console) -> None:
    """Which layers go whole, and which lose their attention."""
    from sspcompile.report.format import layers_named

    if plan.removed:
        console.print(f"Removed whole: {layers_named(plan.removed)}; what stays is numbered from 0 in the output.")
    if plan.silent:
        console.print(f"Attention removed, MLP kept: {layers_named(plan.silent)}.")


def _token(plan: SlicePlan, table: LatencyTable | None) -> Iterator[tuple[str, float, float, str]]:
    """The time of a decoded token, and how sure it is."""
    if table is None:
        return
    from sspcompile.slicing.latency import seconds_of

    dense, sliced = seconds_of(plan, table)
    yield f"a decoded token (ms; fitted within {table.worst:.1%})", 1e3 * dense, 1e3 * sliced, "{:,.4g}"


def print_frontier(frontier: Frontier) -> None:
    """A row for every size and layout, one for both where they come to the same."""
    from sspcompile.report.format import seconds, size

    timed = any(point.token_seconds is not None for point in frontier.points)
    title = f"What can be reached by cutting {frontier.cutting}; memory: weights and cache for {frontier.serving}"
    table = Table("--size", "layout", title=title, title_justify="left")
    for name in ("parameters", "weights", "KV/token", "memory", *(["a token"] if timed else [])):
        table.add_column(name, justify="right", no_wrap=True)
    rows: dict[tuple[str, ...], list[str]] = {}
    for point in frontier.points:
        figures = (
            "smallest" if point.share is None else f"{point.share:g}",
            f"{point.parameters:,}",
            size(point.weight_bytes),
            size(point.kv_bytes_per_token),
            size(point.memory_bytes),
            *([] if point.token_seconds is None else [seconds(point.token_seconds)]),
        )
        rows.setdefault(figures, []).append(point.layout)
    for row, layouts in rows.items():
        table.add_row(row[0], layouts[0] if len(layouts) == 1 else "both", *row[1:])
    Console().print(table)


def _narrowed(plan: SlicePlan) -> bool:
    """Whether an MLP of a layer that stays loses channels."""
    return min(plan.widths[layer] for layer in plan.staying) < plan.geometry.width


def _mlps(g: Geometry) -> str:
    return "MLPs" if g.mlps == 1 else "experts"


def _plan_title(plan: SlicePlan) -> str:
    kept = sum(heads for heads, _ in plan.counts)
    counted = f"{kept} of {plan.geometry.total_heads} heads"
    if _narrowed(plan):
        left = [plan.widths[layer] for layer in plan.staying]
        least, most = min(left), max(left)
        widths = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        g = plan.geometry
        counted = f"{plan.size:.1%} of the parameters, {counted}, {_mlps(g)} {widths} of {g.width:,} wide"
    if plan.removed:
        counted = f"{len(plan.staying)} of {len(plan.layers)} layers, {counted}"
    if plan.silent:
        counted += f", {len(plan.silent)} of {len(plan.staying)} layers without attention"
    custom = " (custom class in the folder)" if plan.custom_code else ""
    return f"{plan.layout} layout: {counted}, loads as {plan.host.architecture}{custom}"


def _layers(plan: SlicePlan) -> Table:
    table = Table(title="By layer, MLP and norms included (dense → sliced)", title_justify="left")
    columns = ["layer", "query heads", "kv heads", "parameters", "weights (MiB)", "KV bytes per token", "FLOPs"]
    if _narrowed(plan):
        columns.insert(3, "MLP width" if plan.geometry.mlps == 1 else "width of experts")
    for name in columns:
        table.add_column(name, justify="right")
    g = plan.geometry
    for index, (cut, width, (dense, sliced)) in enumerate(zip(plan.layers, plan.widths, plan.by_layer, strict=True)):
        none = "layer removed" if cut.removed else "attention removed"
        heads = str(len(cut.heads)) if cut.heads else none
        table.add_row(
            str(index),
            f"{g.heads} → {heads}",
            f"{g.kv_heads} → {len(cut.groups)}",
            *([f"{g.width:,} → {width:,}"] if _narrowed(plan) else []),
            f"{dense.parameters:,} → {sliced.parameters:,}",
            f"{dense.weight_bytes / MEBI:,.1f} → {sliced.weight_bytes / MEBI:,.1f}",
            f"{dense.kv_bytes_per_token:,} → {sliced.kv_bytes_per_token:,}",
            f"{dense.flops_per_token:,} → {sliced.flops_per_token:,}",
        )
    return table


def print_cost(cost: Cost) -> None:
    """A row per stage, then the whole of it."""
    console = Console()
    table = Table("stage", title="A build here, in forward passes over the tokens of each stage", title_justify="left")
    for name in ("texts", "tokens", "passes", "decoding", "share"):
        table.add_column(name, justify="right")
    whole = sum(cost.stage_seconds)
    for stage, seconds in zip(cost.stages, cost.stage_seconds, strict=True):
        steps = str(stage.steps) if stage.steps else ""
        row = (f"{stage.texts:,}", f"{stage.tokens:,}", f"{stage.passes:.1f}", steps, f"{seconds / whole:.0%}")
        table.add_row(stage.name, *row)
    console.print(table)
    console.print(
        f"About {_duration(cost.seconds)} and {cost.peak_bytes / 1e9:.1f} GB at the peak, on {cost.device} in "
        f"{cost.dtype} with {cost.threads} threads: {cost.passes:.1f} passes over {cost.tokens:,} tokens, "
        f"{cost.seconds_per_pass:.1f} s each."
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_criteria(criteria: Iterable[Criterion]) -> None:
    """One row per head score."""
    table = Table("criterion", "what, and its source", "cost, in passes over the prompts", show_lines=True)
    table.columns[0].no_wrap = True
    for entry in criteria:
        bound = "" if entry.max_prompts is None else f" (at most {entry.max_prompts} prompts per domain)"
        what = Text(entry.summary).append(f"\n{entry.source}", style="dim")
        table.add_row(entry.name, what, entry.cost + bound)
    Console().print(table)


def print_mask(mask: HeadMask) -> None:
    """One row per layer: kept heads as blocks shaded by score, removed heads as dots, whitelist underlined; where
    channels were cut the width of the MLP, or of each expert.
    """
    console = Console()
    kept_heads = f"{mask.keep_achieved:.1%} of {mask.layers * mask.heads} heads"
    if mask.removed:
        kept_heads = f"{len(mask.staying)} of {mask.layers} layers, {kept_heads}"
    title = f"{mask.scenario.get('name')}: {mask.layout}, kept {kept_heads}{_channels_kept(mask)}"
    legend = "█ high score … ░ low score, · removed, underlined whitelist"
    table = Table(title=title, title_justify="left", caption=legend, caption_justify="left")
    table.add_column("layer", justify="right")
    table.add_column("heads (│ between key/value groups)")
    table.add_column("query", justify="right")
    table.add_column("kv", justify="right")
    if mask.widths is not None:
        table.add_column(f"{'MLP' if mask.experts == 1 else 'experts'} (of {mask.intermediate:,})", justify="right")
    ranked = sorted(score for row in mask.scores for score in row)
    for layer, kept in enumerate(mask.kept):
        line = Text()
        width = [] if mask.widths is None else [f"{mask.widths[layer]:,}"]
        if not kept:
            line.append("layer removed" if layer in mask.removed else "attention removed", style="dim")
            table.add_row(str(layer), line, "0", "0", *width)
            continue
        for head in range(mask.heads):
            if head and head % mask.group_size == 0:
                line.append("│", style="dim")
            if head not in kept:
                line.append("·", style="dim")
                continue
            place = ranked.index(mask.scores[layer][head]) / max(1, len(ranked) - 1)
            style = "underline" if (layer, head) in mask.whitelist else ""
            line.append(SHADES[1 + min(3, int(place * 4))], style=style)
        table.add_row(str(layer), line, str(len(kept)), str(len(mask.kept_groups(layer))), *width)
    console.print(table)
    if asked := [*_asked(mask)]:
        console.print(f"asked for: at most {', '.join(asked)}")


def _asked(mask: HeadMask) -> Iterator[str]:
    """The bounds that were asked for: on what changes, and on what is kept as a number or a share of all parameters."""
    floor: dict[str, Any] = mask.scenario.get("floor") or {}
    if floor.get("max_loss") is not None:
        yield f"{100 * floor['max_loss']:g}% of the next tokens changed"
    if floor.get("max_perplexity") is not None:
        yield f"{floor['max_perplexity']:g} times the perplexity of replies"
    for name, most in (mask.scenario.get("protect") or {}).items():
        yield f"{100 * most:g}% of those of {name}"
    # Beside a bound on the loss the size of the mask is what that came to.
    size = floor.get("size") if floor else mask.size_requested
    if mask.params_requested is not None:
        yield f"{mask.params_requested:,} parameters"
    elif size is not None:
        yield f"{100 * size:g}% of the parameters"
    if (memory := mask.memory_requested) is not None:
        yield f"{memory['bytes']:,} bytes for {memory['batch']:,} sequences of {memory['context']:,} tokens"
    if (time := mask.latency_requested) is not None:
        from sspcompile.request.sizes import time_text

        load = f"{time['batch']:,} sequences of {time['context']:,} tokens"
        yield f"{time_text(time['nanoseconds'])} for a decoded token with {load} in the cache"


def _channels_kept(mask: HeadMask) -> str:
    if mask.channels is None:
        return ""
    whole, mlps = mask.layers * mask.experts * mask.intermediate, "MLPs" if mask.experts == 1 else "experts"
    return f" and {sum(map(len, mask.channels)) / whole:.1%} of {whole:,} channels of the {mlps}"
