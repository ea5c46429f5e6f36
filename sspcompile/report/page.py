"""The page of a report: its blocks, in the order in which every renderer shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from sspcompile.report.blocks import Block, Page, Table, page
from sspcompile.report.budget import budget_sentence, walked
from sspcompile.report.first import FirstScreen, first_screen, gone_told, heads_told, heat_map, kept_units
from sspcompile.report.format import change, clean, count, figures, percent, quantity, seconds, size, with_interval
from sspcompile.report.model import MaskSection, Pair, QualityRow, Report
from sspcompile.report.rounding import rounding_table, rounding_verdict
from sspcompile.report.speed import LatencyRow, LatencySection
from sspcompile.report.token_time import token_time_table, token_time_verdict
from sspcompile.report.verdict import alarming, verdict

PROMPTS_SHOWN = 5
PROMPT_CHARACTERS = 300


def report_page(report: Report) -> Page:
    """The first screen of a build that was judged, and all blocks that the report has something for."""
    first = first_screen(report)
    found = (
        _findings(report, first),
        _scenario(report),
        _quality(report),
        _layout(report),
        _sizes(report),
        _rounding(report),
        _token_time(report),
        _latency(report),
        _mask(report, first),
        _checks(report),
        _reproduce(report),
    )
    return page(report.title, found, first)


def _findings(report: Report, first: FirstScreen | None) -> Block:
    """The verdict in full, less what the first screen says."""
    sentences = verdict(report)[1 if first else 0 :]
    alarms = sum(map(alarming, sentences))
    # Without one here: the first screen may have said it.
    hint = f"{len(sentences)} sentences" + (f", {alarms} of them a loss or a warning" if alarms else "")
    return Block("findings", "Findings", sentences, hint=hint)


def _scenario(report: Report) -> Block | None:
    s = report.scenario
    if s is None:
        return None
    sentences = [f"{s.name}, read from a {s.source}."]
    if s.text:
        sentences.append(f"“{_short(s.text)}”")
    if s.prompts:
        sentences.append(f"{len(s.prompts)} prompts" + (", the first of them:" if len(s.prompts) > 1 else ":"))
        sentences += [f"“{_short(prompt)}”" for prompt in s.prompts[:PROMPTS_SHOWN]]
    weights = sorted(s.mixture.items(), key=lambda item: (-item[1], item[0]))
    rows = [(name, percent(weight)) for name, weight in weights]
    rows += [("no known domain", percent(s.unknown)), ("breadth (0 one domain, 1 all alike)", figures(s.breadth))]
    table = Table("Mixture", ("domain", "share"), tuple(rows))
    return Block("scenario", "Scenario", tuple(sentences), (table,), hint="its texts and their domains")


def _short(text: str) -> str:
    text = clean(text)
    return text if len(text) <= PROMPT_CHARACTERS else text[:PROMPT_CHARACTERS] + " [...]"


def _quality_table(caption: str, rows: Sequence[QualityRow]) -> Table:
    """The columns of answers and of differences from ours appear where a row has them."""
    columns: list[tuple[str, Callable[[QualityRow], str]]] = [
        ("model", lambda row: row.name),
        ("mean KL, nats per token", lambda row: with_interval(row.mean_kl)),
        ("same next token", lambda row: with_interval(row.top1_agreement, percent)),
    ]
    if any(row.kl_above_ours for row in rows):
        columns.append(("KL above ours", lambda row: with_interval(row.kl_above_ours) if row.kl_above_ours else "-"))
    if any(row.off_kl for row in rows):
        columns.append(("KL off domain", lambda row: with_interval(row.off_kl) if row.off_kl else "-"))
        columns.append(
            ("same off domain", lambda row: with_interval(row.off_agreement, percent) if row.off_agreement else "-")
        )
    if any(row.exact_match for row in rows):
        columns.append(
            ("right answers", lambda row: with_interval(row.exact_match, percent) if row.exact_match else "-")
        )
    headers = tuple(header for header, _ in columns)
    return Table(caption, headers, tuple(tuple(show(row) for _, show in columns) for row in rows))


def _quality(report: Report) -> Block | None:
    if not report.quality:
        return None
    caption = "Against the dense model on held-out prompts of the scenario; 95 % bootstrap intervals over prompts"
    hint = "this build, and others of the same budget, against the dense model"
    tables = (_quality_table(caption, report.quality), *_protected(report))
    return Block("quality", "Quality", (), tables, hint=hint)


def _protected(report: Report) -> Iterator[Table]:
    if report.protected:
        said = {(True, False): "yes", (False, True): "NO"}
        rows = [
            (
                one.domain,
                percent(one.max_loss),
                percent(one.guard_loss),
                with_interval(one.loss, percent),
                said.get((one.holds, one.broken), "no, by no more than chance"),
            )
            for one in report.protected
        ]
        yield Table(
            "Protected: next tokens that change; 95 % bootstrap intervals over prompts",
            ("domain", "allowed", "on prompts that decided", "on prompts that decided nothing", "holds"),
            tuple(rows),
        )


def _layout(report: Report) -> Block | None:
    layout = report.layout
    if layout is None:
        return None
    reason = f" ({layout.reason})" if layout.reason else ""
    tables: tuple[Table, ...] = ()
    if layout.figures:
        tables = (
            _quality_table("Layouts at the same budget, on the guard texts, which decide between them", layout.figures),
        )
    told = f"Requested {layout.requested}, built {layout.chosen}{reason}."
    return Block("layout", "Layout", (told,), tables, hint=f"why it is {layout.chosen}")


def _sizes(report: Report) -> Block | None:
    sizes = report.sizes
    if sizes is None:
        return None

    def row(name: str, pair: Pair, show: Callable[[float], str]) -> tuple[str, ...]:
        return (name, show(pair.dense), show(pair.sliced), change(pair.dense, pair.sliced))

    rows = (
        row("parameters", sizes.parameters, count),
        row("weights", sizes.weight_bytes, size),
        row("KV cache per token", sizes.kv_bytes_per_token, size),
    )
    share = f"Heads are {percent(sizes.prunable_share)} of the dense model's parameters"
    if sizes.channel_share is not None:
        share += f", channels of the MLPs {percent(sizes.channel_share)}"
    table = Table("Dense and sliced", ("", "dense", "sliced", "change"), rows)
    return Block("sizes", "Size", (f"{share}.",), (table,), hint="parameters, weights and KV cache")


def _rounding(report: Report) -> Block | None:
    if report.rounding is None:
        return None
    hint = "the cut, rounded, beside the dense model that is only rounded"
    return Block(
        "rounding",
        "Cutting and rounding",
        (rounding_verdict(report.rounding),),
        (Table(*rounding_table(report.rounding)),),
        hint=hint,
    )


def _token_time(report: Report) -> Block | None:
    if (found := report.token_time) is None:
        return None
    tables, hint = (Table(*token_time_table(found)),), "what was asked for, foretold and measured"
    return Block("token-time", "Time of a token", tuple(token_time_verdict(found)), tables, hint=hint)


def _latency(report: Report) -> Block | None:
    latency = report.latency
    if latency is None:
        return None
    conditions = ", ".join(f"{name} {value}" for name, value in latency.settings.items())
    definitions = {row.metric: row.definition for row in latency.rows if row.definition}
    tables = [
        Table(
            f"{reference} against {contender}: medians, with p10 to p90; improvement above 1 is good, 99 % intervals",
            ("metric", "load", reference, contender, "improvement", "verdict"),
            tuple(_latency_row(row) for row in latency.rows if _pair(row) == (reference, contender)),
        )
        for reference, contender in dict.fromkeys(_pair(row) for row in latency.rows)
    ]
    tables += [*_predicted(latency), *_capacity(latency)]
    tables.append(Table("What is measured", ("metric", "definition"), tuple(definitions.items())))
    hint = "every metric under every load, and what the bytes predict"
    return Block("latency", "Speed and memory", (f"Conditions: {conditions}.",), tuple(tables), hint=hint)


def _pair(row: LatencyRow) -> tuple[str, str]:
    return row.reference, row.contender


def _latency_row(row: LatencyRow) -> tuple[str, ...]:
    def spread(median: float, p10: float, p90: float) -> str:
        text = quantity(median, row.unit)
        return text if p10 == p90 else f"{text} ({quantity(p10, row.unit)} to {quantity(p90, row.unit)})"

    return (
        row.metric,
        row.load or "",
        spread(row.reference_median, row.reference_p10, row.reference_p90),
        spread(row.contender_median, row.contender_p10, row.contender_p90),
        with_interval(row.improvement) if row.improvement else "-",
        row.verdict,
    )


def _predicted(latency: LatencySection) -> Iterator[Table]:
    if latency.rooflines and latency.bandwidth is not None:
        yield Table(
            f"Decoding against reading memory, {size(latency.bandwidth)}/s as measured here: what a step must read",
            ("model", "load", "bytes per step", "FLOPs per token", "reading them takes", "a step took", "share"),
            tuple(
                (
                    row.contender,
                    row.load,
                    size(row.bytes_per_step),
                    "-" if row.flops_per_token is None else count(row.flops_per_token),
                    seconds(row.floor_seconds),
                    seconds(row.measured_seconds),
                    percent(row.floor_seconds / row.measured_seconds),
                )
                for row in latency.rooflines
            ),
        )
    if latency.predictions:
        yield Table(
            "Decoding, times faster: by the bytes alone, and as measured",
            ("pair", "load", "predicted", "measured", "of the saving arrived"),
            tuple(
                (
                    f"{row.contender} against {row.reference}",
                    row.load,
                    figures(row.predicted),
                    with_interval(row.measured),
                    "-" if row.realised is None else percent(row.realised),
                )
                for row in latency.predictions
            ),
        )


def _capacity(latency: LatencySection) -> Iterator[Table]:
    if latency.capacities and latency.memory is not None:
        yield Table(
            f"What fits into {size(latency.memory)} by weights and cache; activations come on top",
            ("model", "longest context of one sequence", f"largest batch at {latency.tokens} tokens"),
            tuple((row.contender, count(row.context), count(row.batch)) for row in latency.capacities),
        )


def _mask(report: Report, first: FirstScreen | None) -> Block | None:
    mask, budget = report.mask, report.budget
    if mask is None:
        return _budget_block(report)
    sentences = [f"{kept_units(mask)} are kept, chosen by {mask.criterion}.", *gone_told(mask)]
    if budget:
        sentences.append(budget_sentence(budget))
    picture = None if first else heat_map(report)
    title = "Heads" if mask.widths is None else "Heads and channels"
    title = "Layers" if mask.removed and mask.widths is None else title
    tables = (*walked(budget), _kept_table(mask))
    return Block("mask", title, tuple(sentences), tables, picture, "which are kept, layer by layer")


def _kept_table(mask: MaskSection) -> Table:
    """A row per layer; the widths of the MLPs where one is narrower than it was."""
    rows = [(str(layer), str(len(row)), heads_told(mask, layer)) for layer, row in enumerate(mask.kept)]
    if mask.widths is None or mask.intermediate is None:
        return Table("Kept query heads per layer", ("layer", "kept", "heads"), tuple(rows))
    whole = mask.intermediate
    shares = [(count(width), percent(width / whole)) for width in mask.widths]
    mlp = "the MLP" if mask.experts == 1 else "each expert"
    return Table(
        f"Kept query heads, and kept channels of {mlp} (of {count(whole)}), per layer",
        ("layer", "heads kept", "heads", "MLP width" if mask.experts == 1 else "width", f"of {mlp}"),
        tuple((*row, *share) for row, share in zip(rows, shares, strict=True)),
    )


def _budget_block(report: Report) -> Block | None:
    budget = report.budget
    hint = "how much was allowed"
    return Block("budget", "Budget", (budget_sentence(budget),), (*walked(budget),), hint=hint) if budget else None


def _checks(report: Report) -> Block | None:
    tables, parity = [], report.parity
    if parity is not None:
        texts = {None: "not compared", True: "identical", False: "DIFFERENT"}[parity.texts_equal]
        row = (
            "equal to the masked model" + (", after repair" if parity.after_repair else ""),
            "yes" if parity.holds else "NO",
            f"difference of logits {figures(parity.relative)} of their scale in {parity.dtype}, "
            f"allowed {figures(parity.tolerance)}; greedy text {texts}",
        )
        tables.append(Table("What was checked", ("check", "result", "detail"), (row,)))
    rows = tuple((row.name, "yes" if row.loads else "NO", row.note or "-") for row in report.runtimes)
    if rows:
        # Small models of every family and layout were run in them; this one was not.
        tables.append(Table("What takes such a model, by its family and layout", ("runtime", "takes it", "how"), rows))
    hint = "whether it equals the masked model, and what takes it"
    return Block("checks", "Checks", (), tuple(tables), hint=hint) if tables else None


def _reproduce(report: Report) -> Block | None:
    sentences = tuple(_reproduce_sentences(report))
    tables: tuple[Table, ...] = ()
    if report.origin:
        tables = (
            Table(
                "Made from (manifest.json has the sha256 of every file)",
                ("", "fingerprint"),
                tuple(report.origin.items()),
            ),
        )
    if report.versions:
        tables = (*tables, Table("Versions", ("package", "version"), tuple(sorted(report.versions.items()))))
    if not sentences and not tables:
        return None
    return Block("reproduce", "How to get it again", sentences, tables, hint="model, command, fingerprints, versions")


def _reproduce_sentences(report: Report) -> Iterator[str]:
    if report.model:
        yield f"Model: {report.model}."
    if report.command:
        yield f"Command: {report.command}"
    yield from report.notes
