"""Sizes as people type them."""

from __future__ import annotations

import re

from sspcompile.errors import InputError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def byte_size(text: str | None, option: str) -> int | None:
    """`5GB`, `200MiB` or `1000000` as bytes, None for None. Raises InputError that calls it `option`."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?", text.strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise InputError(f"{option} {text!r} is not a size.", hint="Type 5GB, 200MiB or a number of bytes.")
    return max(1, int(float(found[1]) * UNITS[(found[2] or "").upper()]))
