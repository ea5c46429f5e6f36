"""What a finished folder may replace: nothing that it is made from, and nothing that this package did not write."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from sspcompile.checkpoint.manifest import NAME as MANIFEST
from sspcompile.checkpoint.manifest import read_manifest
from sspcompile.errors import ArtifactError, InputError, OutputExistsError

PARTIAL_PREFIX = ".partial-"
# A toolkit has no manifest. It is replaced when it cannot be read any more, too, so its files' names have to do.
TOOLKIT = frozenset(("toolkit.json", "toolkit.safetensors"))
# What `bench` and `eval --quantize` write into a build before its manifest names it, should they be killed in between.
ADDED = ("bench.json", "report.*", "mask.svg")
# What systems and Python leave in every folder that somebody looked into.
LITTER = (".DS_Store", "._*", "Thumbs.db", "desktop.ini", "*.pyc", ".nfs*", ".ipynb_checkpoints", "*.swp", "*~")


def refuse_existing(out: Path, *, overwrite: bool, reads: Iterable[Path] = ()) -> None:
    """Raise OutputExistsError unless `out` is free, or may be replaced and holds what this package wrote and nothing
    else; and InputError like `refuse_read`.
    """
    refuse_read(out, reads)
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir() or out.is_symlink():
        raise OutputExistsError(f"{out} is a {'link' if out.is_symlink() else 'file'}.", hint="Give another --out.")
    if not overwrite:
        raise OutputExistsError(f"{out} exists and is kept.", hint="Give --overwrite, or another --out.")
    foreign = _foreign(out)
    if foreign is not None:
        raise OutputExistsError(
            f"{out} holds files that sspcompile did not write ({foreign}), and is kept.",
            hint="Move them away, or give another --out.",
        )


def refuse_read(out: Path, reads: Iterable[Path], *, option: str = "--out") -> None:
    """Raise InputError where `out`, which the command calls `option`, is or holds anything of `reads`, or lies in a
    folder of them that has a manifest, whichever names and links lead there.
    """
    whole = _resolved(out)
    for read in reads:
        for place in filter(Path.exists, _places(read)):
            inside, holds = _is_or_lies_in(whole, place), whole.exists() and _is_or_lies_in(place, whole)
            if inside and holds:
                raise InputError(f"{out} is what the command reads, and is kept.", hint=f"Give another {option}.")
            # A manifest names all that a folder holds; others, as a clone of a model, may take a folder more.
            if inside and _is_ours(place):
                raise InputError(
                    f"{out} lies inside {read}, which the command reads.", hint=f"Give an {option} outside of it."
                )
            if holds:
                raise InputError(
                    f"{out} holds {read}, which the command reads, and is kept.", hint=f"Give another {option}."
                )


def _places(read: Path) -> Iterator[Path]:
    """Where a file or a folder lies: by its own name, where a link leads, and where links that it holds lead, as those
    of a snapshot in the hub's cache.
    """
    named = Path(os.path.abspath(read))  # noqa: PTH100 (`.` has no name of its own, and resolve() follows a link)
    yield _resolved(named.parent) / named.name
    yield _resolved(read)
    if read.is_dir():
        yield from (_resolved(path) for path in sorted(read.iterdir()) if path.is_symlink())


def _resolved(path: Path) -> Path:
    return Path(os.path.realpath(path))  # resolve() of Python 3.11 fails at links that lead in a circle


def _is_or_lies_in(inner: Path, outer: Path) -> bool:
    """By what the file system says, because names can differ in case; `outer` exists."""
    return any(place.exists() and place.samefile(outer) for place in (inner, *inner.parents))


def _foreign(folder: Path) -> str | None:
    """A file or folder in it that this package did not write; None where there is none."""
    top = {path.name for path in folder.iterdir() if not _left_behind(path.relative_to(folder))}
    if top <= TOOLKIT:
        return None
    if MANIFEST not in top:
        return min(top)
    try:
        named = read_manifest(folder).files
    except ArtifactError:  # another program's, or damaged
        return MANIFEST
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if (path.is_dir() and not path.is_symlink()) or _left_behind(inside):
            continue
        name = inside.as_posix()
        if name != MANIFEST and name not in named and not any(fnmatchcase(name, pattern) for pattern in ADDED):
            return name
    return None


def _is_ours(folder: Path) -> bool:
    """Whether a folder has a manifest of this package."""
    if not (folder / MANIFEST).is_file():
        return False
    try:
        read_manifest(folder)
    except ArtifactError:  # another program's, or damaged
        return False
    return True


def _left_behind(inside: Path) -> bool:
    """Whether a killed run, a system or Python left it."""
    litter = any(fnmatchcase(part, pattern) for part in inside.parts for pattern in LITTER)
    return litter or inside.parts[0].startswith(PARTIAL_PREFIX)
