"""Numbers as people read them, and text from prompts made harmless."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

from sspcompile.intervals import Estimate

JOINERS = "\u200c\u200d"
BYTE_STEPS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def clean(text: str) -> str:
    """Control, format and unassigned characters made visible as escapes; white space collapsed to single spaces.

    Terminal sequences start with such a character; right-to-left overrides can turn a line round; XML 1.0 forbids
    most of them.
    """
    shown = "".join(c if c in "\n\t" or not _hidden(c) else f"\\u{{{ord(c):x}}}" for c in text)
    return " ".join(shown.split())


def _hidden(character: str) -> bool:
    # Of the format characters only the joiners stay: some scripts need them inside words.
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp") and character not in JOINERS


def figures(value: float) -> str:
    """Three significant digits without an exponent where that is readable."""
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e6:
        decimals = max(0, 2 - _exponent(value))
        return f"{value:,.{decimals}f}"
    return f"{value:.2e}"


def _exponent(value: float) -> int:
    return int(f"{abs(value):.2e}".split("e")[1])


def count(value: float) -> str:
    return f"{round(value):,}"


def percent(value: float) -> str:
    """A share as percent, one decimal; never rounded up to 100 or down to 0."""
    text = f"{100 * value:.1f}"
    if text == "100.0" and value < 1:
        return "just under 100 %"
    if text == "0.0" and value > 0:
        return "under 0.1 %"
    return f"{text.removesuffix('.0')} %"


def size(value: float) -> str:
    for step, unit in BYTE_STEPS:
        if abs(value) >= step:
            return f"{value / step:.2f} {unit}"
    return f"{count(value)} bytes"


def seconds(value: float) -> str:
    if abs(value) >= 1:
        return f"{figures(value)} s"
    return f"{figures(value * 1e3)} ms"


def quantity(value: float, unit: str) -> str:
    """A value of a metric in its unit: s, tokens/s, bytes or count."""
    if unit == "s":
        return seconds(value)
    if unit == "bytes":
        return size(value)
    if unit == "count":
        return count(value)
    return f"{figures(value)} {unit}"


def with_interval(estimate: Estimate, show: Callable[[float], str] = figures) -> str:
    """`0.12 (0.10 to 0.15)`."""
    text = show(estimate.value)
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} ({show(estimate.low)} to {show(estimate.high)})"


def change(dense: float, sliced: float) -> str:
    """`-12.5 %` of the dense value."""
    if dense == sliced or dense == 0:
        return "no change" if dense == sliced else "-"
    share = (sliced - dense) / dense
    return ("+" if share > 0 else "-") + percent(abs(share))


def ranges(numbers: Sequence[int]) -> str:
    """`0-3, 6` for (0, 1, 2, 3, 6)."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans) or "none"
