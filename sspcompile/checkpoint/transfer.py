"""Moving bytes from file to file without looking at them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sspcompile.errors import CheckpointError

Moved = Callable[[int], None]

# Progress is told this often; the kernel moves as much per call as it likes.
KERNEL_BYTES = 64 << 20
# What a core's own cache holds: 4 MiB took twice as long.
BUFFER_BYTES = 256 << 10
# What file systems, kernels and containers answer when they cannot copy between these two files.
NO_KERNEL_COPY = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF})
NO_HARD_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP})


@dataclass(frozen=True)
class Extent:
    """`length` bytes of a file from `offset` on."""

    file: Path
    offset: int
    length: int


def copy_extent(source: int, target: int, extent: Extent, moved: Moved | None = None, *, kernel: bool = True) -> None:
    """Append an extent of the open file `source` to the open file `target` at its position.

    The kernel copies where it can (sharing blocks on file systems that do that), a small buffer otherwise. Without
    `kernel` always the buffer: between places that differ within a page the kernel copies at two thirds of its speed.
    Raises CheckpointError when the source ends early.
    """
    done = 0
    if not kernel:
        _buffered_copy(source, target, extent, done, moved)
        return
    while done < extent.length:
        want = min(KERNEL_BYTES, extent.length - done)
        count = _kernel_copy(source, target, extent.offset + done, want)
        if count is None:
            _buffered_copy(source, target, extent, done, moved)
            return
        if count == 0:
            raise _ended(extent)
        done += count
        if moved is not None:
            moved(count)


def _kernel_copy(source: int, target: int, offset: int, count: int) -> int | None:
    """Bytes copied, or None where the kernel cannot."""
    if not hasattr(os, "copy_file_range"):
        return None
    try:
        return os.copy_file_range(source, target, count, offset)
    except OSError as error:
        if error.errno in NO_KERNEL_COPY:
            return None
        raise


def _buffered_copy(source: int, target: int, extent: Extent, done: int, moved: Moved | None) -> None:
    buffer = memoryview(bytearray(min(BUFFER_BYTES, extent.length)))
    while done < extent.length:
        count = os.preadv(source, [buffer[: extent.length - done]], extent.offset + done)
        if not count:
            raise _ended(extent)
        write_all(target, buffer[:count])
        done += count
        if moved is not None:
            moved(count)


def write_all(target: int, data: bytes | memoryview) -> None:
    """Write everything; a single write may stop short."""
    view = memoryview(data).cast("B") if len(data) else memoryview(b"")
    while view:
        view = view[os.write(target, view) :]


def read_all(source: int, view: memoryview, offset: int) -> bool:
    """Fill `view` (bytes) from `offset`; false when the file ends before it is full."""
    while view:
        count = os.preadv(source, [view], offset)
        if not count:
            return False
        view, offset = view[count:], offset + count
    return True


def hard_link(source: Path, target: Path) -> bool:
    """Make `target` a second name of a file; false where the file system has none."""
    try:
        os.link(source.resolve(), target)  # a hub cache holds links to its files
    except OSError as error:
        if error.errno in NO_HARD_LINK:
            return False
        raise
    return True


def _ended(extent: Extent) -> CheckpointError:
    return CheckpointError(f"{extent.file.name} is shorter than its header says.", hint="Download it again.")
