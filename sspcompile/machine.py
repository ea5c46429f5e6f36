"""What this process may use of the machine: cores and memory, a container's limits included; and what it is."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path

import psutil

CGROUP, CPUINFO = Path("/sys/fs/cgroup"), Path("/proc/cpuinfo")
# (limit, use, statistics, the statistic that counts pages of files which can be dropped) of cgroup versions 2 and 1.
MEMORY_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


# Of glibc's <malloc.h>: blocks of so many bytes and more are mapped one by one.
M_MMAP_THRESHOLD = -3
MAPPED_BYTES = 4 << 20


def give_memory_back() -> None:
    """From here on every large block that this process frees goes back to the system at once.

    glibc keeps blocks of up to 32 MB once it has seen a larger one freed. Activations of batches of all lengths are of
    that size, and leave holes that nothing fits into: 0.8 GB of a build of 1.2 B parameters. To map each anew takes
    about a tenth of the time, so this is for processes that promised to stay below a limit. Whoever has set the size
    is not overruled; without glibc nothing happens.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or not sys.platform.startswith("linux"):
        return
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if adjust is not None:
        adjust(M_MMAP_THRESHOLD, MAPPED_BYTES)


def usable_cores(cgroup: Path = CGROUP) -> int:
    """The cores that this process may run on: its affinity, and whole cores of a container's quota; at least 1."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    quota = _quota(cgroup)
    return max(1, cores if quota is None else min(cores, int(quota)))


def _quota(cgroup: Path) -> float | None:
    """Cores' worth of time that a container gets; None for as much as there is."""
    text = _text(cgroup / "cpu.max")  # version 2: "200000 100000" or "max 100000"
    if text is None:
        parts = [_text(cgroup / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
        text = " ".join(filter(None, parts))
    numbers = [int(word) for word in text.split() if word.isdecimal()]
    return numbers[0] / numbers[1] if len(numbers) == 2 and numbers[1] else None


def processor_name() -> str:
    """What the processor calls itself, or its architecture where it does not."""
    for line in (_text(CPUINFO) or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def free_memory(cgroup: Path = CGROUP) -> int:
    """Bytes that this process can still take without swapping: of the machine, or of its container."""
    free = int(psutil.virtual_memory().available)
    for limit, used, statistics, droppable in MEMORY_FILES:
        most, now = _number(cgroup / limit), _number(cgroup / used)
        if most is not None and now is not None:
            lines = (_text(cgroup / statistics) or "").splitlines()
            files = sum(int(line.split()[1]) for line in lines if line.split()[:1] == [droppable])
            return max(0, min(free, most - now + files))
    return free


def resident_bytes() -> int:
    """What this process holds in memory now."""
    return int(psutil.Process().memory_info().rss)


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text is not None and text.isdecimal() else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
