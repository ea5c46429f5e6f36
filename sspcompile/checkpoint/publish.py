"""Whole or absent: output is built in a sibling folder, synced, and renamed last."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sspcompile.checkpoint.source import sync_folder
from sspcompile.errors import InputError, OutputExistsError

PARTIAL_PREFIX = ".partial-"
REPLACED_PREFIX = ".replaced-"


@contextlib.contextmanager
def staged(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `out`; on a clean exit it becomes `out`, on any exception it is removed.

    Raises OutputExistsError when `out` exists (always, before any work) unless `overwrite`, and InputError when the
    place cannot be written to. With `overwrite` the old folder stays readable until the new one is complete.
    """
    out = out.absolute()
    if out.exists() and not overwrite:
        raise OutputExistsError(f"{out} exists and is kept.", hint="Give --overwrite, or another --out.")
    if out.exists() and not out.is_dir():
        raise OutputExistsError(f"{out} is a file.", hint="Give another --out.")
    partial = out.with_name(f"{PARTIAL_PREFIX}{out.name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
    except OSError as error:
        raise InputError(f"Cannot write beside {out}: {error.strerror}.", hint="Give another --out.") from error
    try:
        yield partial
        _sync_tree(partial)
        _swap(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _swap(partial: Path, out: Path) -> None:
    replaced = out.with_name(f"{REPLACED_PREFIX}{out.name}")
    shutil.rmtree(replaced, ignore_errors=True)
    if out.exists():
        out.rename(replaced)
    partial.rename(out)
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


def write_atomically(path: Path, text: str) -> None:
    """Replace one small text file as a whole."""
    temporary = path.with_name(f"{PARTIAL_PREFIX}{path.name}")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)
