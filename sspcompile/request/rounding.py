"""What `--quantize` takes: precisions of an ONNX export, and types of a GGUF that this package rounds to itself."""

from __future__ import annotations

import re
from typing import Literal, get_args

Rounded = Literal["int8", "int4", "q8_0", "q4_0"]
# GGUF types that llama.cpp's own quantiser writes: how it rounds is not known here.
OWN_QUANTISER = re.compile(r"(i?q\d_|tq\d_)\w+", re.IGNORECASE)


def known_rounding(given: object) -> object:
    """What was given, in small letters where it is known: llama.cpp writes its types in capitals. Raises ValueError for
    a GGUF type that only llama.cpp rounds to.
    """
    if isinstance(given, str) and given.lower() in get_args(Rounded):
        return given.lower()
    if isinstance(given, str) and OWN_QUANTISER.fullmatch(given):
        raise ValueError(
            f"{given:.20} is rounded by llama.cpp's own quantiser, which no refit knows; give q8_0 or q4_0, or build "
            f"without quantize and export with --format gguf --type {given.lower():.20}"
        )
    return given
