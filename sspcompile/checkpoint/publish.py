"""Whole or absent: output is built in a sibling folder, synced, and renamed last.

A sibling is `.partial-NAME-xxxxxxxx`: a lock, which the system lets go of when its run ends, however that ends, and
what is being built. The next run that writes NAME removes the siblings whose lock nobody holds.
"""

from __future__ import annotations

import atexit
import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock

from sspcompile.checkpoint.replacing import PARTIAL_PREFIX, refuse_existing
from sspcompile.checkpoint.source import sync_folder
from sspcompile.errors import InputError

REPLACED_PREFIX = ".replaced-"
LOCK = "lock"
LOCK_POLL_SECONDS = 0.01


@contextlib.contextmanager
def staged(out: Path, *, overwrite: bool = False, reads: Sequence[Path] = ()) -> Iterator[Path]:
    """Yield an empty folder beside `out`; on a clean exit it becomes `out`, on any exception it is removed.

    `reads`: what it is made from, which `out` must neither be, hold nor lie in. Raises what `refuse_existing` raises,
    before any work and again at the end, and InputError when the place cannot be written to. With `overwrite` the old
    folder stays readable until the new one is complete. What a killed run left is removed; a run that is still at work
    is left alone.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100 (resolves `..` and keeps symbolic links, which absolute() does not)
    refuse_existing(out, overwrite=overwrite, reads=reads)
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sibling = _Sibling(out)
    except OSError as error:
        _remove_empty(made)
        raise InputError(f"Cannot write beside {out}: {error.strerror}.", hint="Give another --out.") from error
    try:
        yield sibling.content
        _sync_tree(sibling.content)
        _swap(sibling, out, overwrite=overwrite, reads=reads)
    except BaseException:
        sibling.remove()
        _remove_empty(made)
        raise
    sibling.remove()


@contextlib.contextmanager
def scratch(parent: Path, name: str) -> Iterator[Path]:
    """Yield an empty folder in `parent` that is removed afterwards; what a killed run left of this name is removed
    before. Raises InputError when the place cannot be written to.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        sibling = _Sibling(parent / name)
    except OSError as error:
        raise InputError(f"Cannot write in {parent}: {error.strerror}.", hint="Give another place.") from error
    try:
        yield sibling.content
    finally:
        sibling.remove()


def temporary(name: str) -> Path:
    """An empty folder where the system keeps temporary files (TMPDIR), until the process ends or `remove_temporary`.

    What a killed run left of this name is removed before. Raises InputError when the place cannot be written to.
    """
    return _KEPT.enter_context(scratch(Path(tempfile.gettempdir()), name))


def remove_temporary() -> None:
    """Remove every `temporary` folder of this process."""
    _KEPT.close()


_KEPT = contextlib.ExitStack()
atexit.register(remove_temporary)


class _Sibling:
    """A fresh folder beside `out`, in it a lock that says that its run is alive, and `content` to build in."""

    def __init__(self, out: Path) -> None:
        _remove_leftovers(out)
        while True:
            self.folder = Path(tempfile.mkdtemp(prefix=f"{PARTIAL_PREFIX}{out.name}-", dir=out.parent))
            # Named so that it still says what it is if somebody takes it out.
            self.content = self.folder / f"{PARTIAL_PREFIX}{out.name}"
            self._lock = _lock_of(self.folder)
            try:
                self._lock.acquire()
                # mkdtemp lets nobody else in; what is published has the permissions of any other folder.
                self.content.mkdir()
                return
            except (FileNotFoundError, FileExistsError):
                # Until it was locked, another run that began here took it for what a killed one had left. filelock
                # makes a folder that it misses, and says that it exists if it goes at that moment.
                self.remove()
            except BaseException:
                self.remove()
                raise

    def remove(self) -> None:
        """Remove it with what it holds. The lock goes first: Windows keeps files that are open."""
        self._lock.release()
        shutil.rmtree(self.folder, ignore_errors=True)


def _lock_of(folder: Path) -> FileLock:
    return FileLock(folder / LOCK, thread_local=False, poll_interval=LOCK_POLL_SECONDS)


def _remove_leftovers(out: Path) -> None:
    """Remove the partial folders of runs that died: the system released their locks."""
    for partial in out.parent.glob(f"{PARTIAL_PREFIX}{glob.escape(out.name)}-????????"):
        # A run that is alive holds its lock, another user's folder cannot be entered: a Timeout is an OSError, too.
        with contextlib.suppress(OSError):
            with _lock_of(partial).acquire(timeout=0):
                shutil.rmtree(partial, ignore_errors=True)
            partial.rmdir()  # Windows has kept the lock until here, and with it the folder
    if out.exists():  # then nobody needs what it replaced; without it, that is the user's only copy
        for replaced in out.parent.glob(f"{REPLACED_PREFIX}{glob.escape(out.name)}-????????"):
            shutil.rmtree(replaced, ignore_errors=True)


def _remove_empty(folders: list[Path]) -> None:
    """Remove the parents that a failed run made, innermost first, unless something else lies in them by now."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _swap(sibling: _Sibling, out: Path, *, overwrite: bool, reads: Sequence[Path]) -> None:
    replaced = out.with_name(REPLACED_PREFIX + sibling.folder.name.removeprefix(PARTIAL_PREFIX))
    # Another run may have published here in the meantime.
    refuse_existing(out, overwrite=overwrite, reads=reads)
    try:
        if out.exists():
            out.rename(replaced)
        sibling.content.rename(out)
    except BaseException:
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        raise
    sync_folder(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        else:
            sync_folder(path)
    sync_folder(folder)


def write_atomically(path: Path, content: str | bytes | Iterable[bytes | memoryview]) -> None:
    """Replace one file as a whole, by text, bytes or pieces of them in order; of several runs that do so at once, each
    writes all of it.
    """
    if isinstance(content, str):
        content = content.encode("utf-8")
    sibling = _Sibling(path)
    try:
        temporary = sibling.content / path.name
        with temporary.open("wb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        sibling.remove()
