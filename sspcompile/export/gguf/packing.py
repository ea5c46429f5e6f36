"""gguf's writer, with long arrays packed at once.

gguf packs an array item by item, in three calls each. A vocabulary has 100,000 tokens and merges and more, and packing
them so takes longer than copying the weights of a small model.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from gguf import GGUFValueType, GGUFWriter


class Writer(GGUFWriter):
    """Writes the bytes that GGUFWriter writes, little-endian."""

    def _pack_val(self, val: Any, vtype: GGUFValueType, add_vtype: bool, *args: Any, **kwargs: Any) -> bytes:
        # gguf's own method for any value. Should a later version call another one, files are only written more slowly.
        packed = None if args or kwargs.get("sub_type") else packed_array(val, vtype)
        if packed is None:
            return super()._pack_val(val, vtype, add_vtype, *args, **kwargs)
        return (struct.pack("<I", vtype) if add_vtype else b"") + packed


def packed_array(values: Any, vtype: GGUFValueType) -> bytes | None:
    """A list of strings, or one of whole numbers of 32 bits, as a GGUF holds it; None for any other value.

    That is the type of an item, their number, and the items: a string in UTF-8 behind its length in bytes.
    """
    if vtype != GGUFValueType.ARRAY or not isinstance(values, list):
        return None
    kinds = {*map(type, values)}
    if kinds == {str}:
        return struct.pack("<IQ", GGUFValueType.STRING, len(values)) + _strings(values)
    if kinds == {int}:
        return struct.pack(f"<IQ{len(values)}i", GGUFValueType.INT32, len(values), *values)
    return None


def _strings(strings: Sequence[str]) -> bytes:
    encoded = [one.encode() for one in strings]
    lengths = {length: struct.pack("<Q", length) for length in {*map(len, encoded)}}
    return b"".join(part for one in encoded for part in (lengths[len(one)], one))
