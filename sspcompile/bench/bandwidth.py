"""How fast this machine reads memory, measured on the spot: the roofline of decoding."""

from __future__ import annotations

import time

PASSES = 12
FLOAT = 4


def read_bandwidth(size: int, threads: int, device: str) -> float:
    """Bytes per second at which `size` bytes of fp32 are read and added up on all threads, best of several passes.

    A size that fits into a cache measures the cache, as decoding a model of that size does.
    """
    import torch

    torch.set_num_threads(threads)
    numbers = torch.ones(max(1, size // FLOAT), dtype=torch.float32, device=device)
    passes = []
    for _ in range(PASSES):
        start = time.perf_counter()
        numbers.sum().item()
        passes.append(time.perf_counter() - start)
    return numbers.numel() * FLOAT / min(passes)
