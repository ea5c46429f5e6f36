"""Memory of this process and of a cache, in bytes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def kv_bytes_per_token(cache: Any) -> int:
    """Bytes that one token of one sequence takes in a transformers cache, summed over layers.

    Keys and values are [batch, kv_heads, tokens, head_dim]; a layer without attention holds none.
    """
    total = 0
    for layer in cache.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if tensor is not None and tensor.numel():
                total += tensor.shape[1] * tensor.shape[3] * tensor.element_size()
    return total


def peak_resident_bytes() -> int:
    """Peak resident memory of this process since it started, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: Linux carries the *parent's* resident size over fork and exec into it.
        line = next(line for line in status.read_text("ascii", "replace").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import psutil

    info = psutil.Process().memory_info()
    peak_wset = getattr(info, "peak_wset", None)  # on Windows
    if peak_wset is not None:
        return int(peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
