"""Whole or absent: output is built in a sibling folder, synced, and renamed last."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sspcompile.checkpoint.source import sync_folder
from sspcompile.errors import InputError, OutputExistsError

PARTIAL_PREFIX = ".partial-"
REPLACED_PREFIX = ".replaced-"
# What marks a folder as ours: only such a folder, or an empty one, is ever replaced.
OWN_FILES = ("manifest.json", "toolkit.json")


@contextlib.contextmanager
def staged(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `out`; on a clean exit it becomes `out`, on any exception it is removed.

    Raises OutputExistsError when `out` exists (before any work, and again at the end) unless `overwrite`, and always
    when it is something that this package did not write; InputError when the place cannot be written to. With
    `overwrite` the old folder stays readable until the new one is complete. What a killed run left is removed; a
    run that is still at work is left alone.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100 (resolves `..` and keeps symbolic links, which absolute() does not)
    refuse_existing(out, overwrite=overwrite)
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        partial, lock = _begin(out)
    except OSError as error:
        _remove_empty(made)
        raise InputError(f"Cannot write beside {out}: {error.strerror}.", hint="Give another --out.") from error
    try:
        yield partial
        _sync_tree(partial)
        _swap(partial, out, overwrite=overwrite)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        _remove_empty(made)
        raise
    finally:
        os.close(lock)


@contextlib.contextmanager
def scratch(parent: Path, name: str) -> Iterator[Path]:
    """Yield an empty folder in `parent` that is removed afterwards; what a killed run left of this name is removed
    before. Raises InputError when the place cannot be written to.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(parent / name)
        folder, lock = _begin(parent / name)
    except OSError as error:
        raise InputError(f"Cannot write in {parent}: {error.strerror}.", hint="Give another place.") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def refuse_existing(out: Path, *, overwrite: bool) -> None:
    """Raise OutputExistsError unless `out` is free, or may be replaced and is a folder of this package's making."""
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir() or out.is_symlink():
        raise OutputExistsError(f"{out} is a {'link' if out.is_symlink() else 'file'}.", hint="Give another --out.")
    if not overwrite:
        raise OutputExistsError(f"{out} exists and is kept.", hint="Give --overwrite, or another --out.")
    ours = any((out / name).is_file() for name in OWN_FILES)
    if not ours and any(out.iterdir()):
        raise OutputExistsError(
            f"{out} holds files that sspcompile did not write, and is kept.", hint="Give another --out."
        )


def _begin(out: Path) -> tuple[Path, int]:
    """A fresh folder beside `out`, and the lock that says that its run is alive."""
    while True:
        partial = Path(tempfile.mkdtemp(prefix=f"{PARTIAL_PREFIX}{out.name}-", dir=out.parent))
        # Until it is locked, another run that begins here takes it for what a killed one left.
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(partial, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if partial.exists():
                break
            os.close(lock)
    # mkdtemp lets nobody else in; the finished folder has the permissions of any other.
    umask = os.umask(0)
    os.umask(umask)
    partial.chmod(0o777 & ~umask)
    return partial, lock


def _remove_leftovers(out: Path) -> None:
    """Remove the partial folders of runs that died: the system released their locks."""
    for partial in out.parent.glob(f"{PARTIAL_PREFIX}{glob.escape(out.name)}-????????"):
        with contextlib.suppress(OSError):
            lock = os.open(partial, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(partial, ignore_errors=True)
            finally:
                os.close(lock)
    if out.exists():  # then nobody needs what it replaced; without it, that is the user's only copy
        for replaced in out.parent.glob(f"{REPLACED_PREFIX}{glob.escape(out.name)}-????????"):
            shutil.rmtree(replaced, ignore_errors=True)


def _remove_empty(folders: list[Path]) -> None:
    """Remove the parents that a failed run made, innermost first, unless something else lies in them by now."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _swap(partial: Path, out: Path, *, overwrite: bool) -> None:
    replaced = partial.with_name(REPLACED_PREFIX + partial.name.removeprefix(PARTIAL_PREFIX))
    # Another run may have published here in the meantime.
    refuse_existing(out, overwrite=overwrite)
    try:
        if out.exists():
            out.rename(replaced)
        partial.rename(out)
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


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace one file as a whole; of several runs that do so at once, each writes all of it."""
    temporary = path.with_name(f"{PARTIAL_PREFIX}{path.name}")
    with contextlib.closing(_locked(temporary)) as file:
        try:
            file.truncate(0)
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _locked(path: Path) -> BinaryIO:
    """The file at `path`, made if need be, which no other run holds until it is closed."""
    while True:
        file = path.open("ab")
        fcntl.flock(file, fcntl.LOCK_EX)
        # Whoever held it before has renamed it: then this is the finished file, which is not to be written again.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()
