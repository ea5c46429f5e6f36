"""Cutting against rounding: the rows of the table, and the sentence that says which is the better deal."""

from __future__ import annotations

from sspcompile.report.format import percent, size, with_interval
from sspcompile.report.model import RoundingRow, RoundingSection

BETTER = "ROUNDING ALONE IS THE BETTER DEAL"
AS_GOOD = "ROUNDING ALONE DOES AS WELL"
# What the exporter does where nothing else is said, and what therefore goes without saying.
USUAL_BLOCK = 32


def named(row: RoundingRow) -> str:
    """`cut, int4`; blocks of another size than usual are named."""
    blocks = "" if row.block_size in (None, USUAL_BLOCK) else f" in blocks of {row.block_size}"
    return f"{row.of}, {row.precision}{blocks}"


def asked(section: RoundingSection) -> RoundingRow:
    """The cut in the precision that was asked for."""
    return next(row for row in section.rows if (row.of, row.precision) == ("cut", section.precision))


def rounding_verdict(section: RoundingSection) -> str:
    """Whether a dense model that is only rounded has no more bytes than the rounded cut and loses no more."""
    ours = asked(section)
    dense = [row for row in section.rows if row.of == "dense" and row.block_size is not None]
    rivals = [row for row in dense if row.weight_bytes <= ours.weight_bytes]
    if not rivals:
        smallest = min(dense, key=lambda row: row.weight_bytes)
        tried = " or ".join(dict.fromkeys(row.precision for row in dense))
        return f"No dense model that is only rounded to {tried} is as small: {_told(ours)}, {_told(smallest)}."
    best = min(rivals, key=lambda row: row.mean_kl.value)
    told, gap = f"{_told(ours)}, {_told(best)}", best.kl_above_asked
    if gap is None or gap.low is None or gap.high is None:
        return f"Too few texts tell whether the cut or rounding alone is the better deal: {told}."
    paired = f"text by text {with_interval(gap)} above the cut's"
    if gap.low > 0:
        return f"Rounded, the cut lies below the line of dense models that are only rounded: {told}, {paired}."
    if gap.high < 0:
        return f"{BETTER}: {told}, {paired}."
    return f"{AS_GOOD}: {told}, not measurably more or less than the cut ({paired})."


def _told(row: RoundingRow) -> str:
    model = "the cut" if row.of == "cut" else "the dense model"
    blocks = "" if row.block_size == USUAL_BLOCK else f" (blocks of {row.block_size})"
    cost = f"{size(row.weight_bytes)} for a KL of {with_interval(row.mean_kl)} nats"
    return f"{model} in {row.precision}{blocks} takes {cost}"


def rounding_table(section: RoundingSection) -> tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Caption, headers and rows, the largest model first."""
    answers = any(row.answer_perplexity for row in section.rows)
    above = f"KL above that of cut, {section.precision}"
    headers = ("model", "weights", "mean KL, nats per token", "changed next tokens", above)
    rows = sorted(section.rows, key=lambda row: -row.weight_bytes)
    return (
        f"Bytes against loss, from the dense model as it is stored; {section.texts} texts that decided nothing, "
        f"{section.runtime}",
        (*headers, "perplexity of answers, times") if answers else headers,
        tuple(_cells(row, _name(row, section), answers=answers) for row in rows),
    )


def _name(row: RoundingRow, section: RoundingSection) -> str:
    return named(row) + (", refitted for it" if section.refitted and row is asked(section) else "")


def _cells(row: RoundingRow, name: str, *, answers: bool) -> tuple[str, ...]:
    if row.of == "dense" and row.block_size is None:
        cells: tuple[str, ...] = (name, size(row.weight_bytes), "the reference", "-", "-")
        return (*cells, "1") if answers else cells
    above, times = row.kl_above_asked, row.answer_perplexity
    cells = (
        name,
        size(row.weight_bytes),
        with_interval(row.mean_kl),
        with_interval(row.changed, percent),
        with_interval(above) if above else "-",
    )
    return (*cells, with_interval(times) if times else "-") if answers else cells
