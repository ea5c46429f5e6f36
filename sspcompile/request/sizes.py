"""Sizes and times as people type them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal

from sspcompile.errors import InputError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
# In nanoseconds.
TIMES = {"US": 10**3, "MS": 10**6, "S": 10**9}
BYTES_HINT = "Type 5GB, 200MiB or a number of bytes."


def byte_size(text: str | None, option: str) -> int | None:
    """`5GB`, `200MiB` or `1000000` as bytes, None for None. Raises InputError that calls it `option`."""
    if text is None:
        return None
    found = parsed(text, UNITS)
    if found is None:
        raise InputError(f"{option} {text!r} is not a size.", hint=BYTES_HINT)
    return found


def parsed(text: str, units: Mapping[str, int]) -> int | None:
    """A number with one of the units behind it as a whole one, rounded down, 1 at least; None for anything else."""
    found = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)\s*([A-Z]*)", text.strip().upper(), re.ASCII)
    if found is None or found[2] not in units:
        return None
    # A float would be one off for some sizes.
    number = Decimal(found[1].replace("_", "")) * units[found[2]]
    return max(1, int(number)) if number > 0 else None


def size_text(size: int) -> str:
    """Bytes as they are typed, of three digits, which allow no less than they say: `2.39GB`. Small ones are exact."""
    unit = next((unit for unit in ("GB", "MB", "KB") if size >= UNITS[unit]), "")
    step = max(1, 10 ** (len(str(size)) - 3))
    return f"{(Decimal(-(-size // step) * step) / UNITS[unit]).normalize():f}{unit}"


def time_text(nanoseconds: int) -> str:
    """A time as it is typed, exactly: `35ms`, `812.5us`."""
    unit = next((unit for unit in ("S", "MS") if nanoseconds >= TIMES[unit]), "US")
    return f"{(Decimal(nanoseconds) / TIMES[unit]).normalize():f}{unit.lower()}"
