"""What a stage has measured so far, kept in a folder: an interrupted run goes on at the batch or layer where it was.

Whoever runs the model in pieces asks `current()` for `Rows` (an array per numbered piece, such as a batch) or for a
`State` (where a walk through the layers stands), under a name and everything that the result depends on. What an
earlier run kept is there at once; the rest is measured, and kept. The numbers are those of an undisturbed run, bit for
bit.

A journal writes when `every` seconds have gone by since it last wrote, and not before 20 times what that took: about a
twentieth of the time at most goes into writing, and a run that takes less than `every` writes nothing. An interrupt
that Python hears of writes the rows that wait. Bytes written:

    rows     every row once, with about 100 bytes beside it
    states   (size of the state) * min(layers, seconds of work / every) per walk

The folder holds all rows, and no more than STATES_BYTES of states, the newest. Nothing in it looks finished: files are
whole or absent, none is a pickle, and each carries a digest of its content. A damaged file is refused, because a wrong
number would go into what is published without a word.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import transformers
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from torch import Tensor

import sspcompile
from sspcompile.checkpoint.publish import write_atomically
from sspcompile.checkpoint.writer import pieces_of
from sspcompile.errors import GateError, InputError, RunError
from sspcompile.model.chat import template_digest

if TYPE_CHECKING:
    from sspcompile.model.decoder import LoadedModel

PREFIX = ".unfinished-"
SUFFIX = ".safetensors"
LOCK = "lock"
SECONDS = 15.0
REST = 20
STATES_BYTES = 4 << 30
KEPT_DAYS = 14
DAY_SECONDS = 24 * 3600

Arrays = Mapping[str, np.ndarray]


class Journal:
    """Keeps what was measured in `folder`, writing at most once in `every` seconds (SECONDS unless given).

    Without a folder it keeps nothing.
    """

    def __init__(self, folder: Path | None = None, *, every: float | None = None) -> None:
        self.folder = folder
        self.every = SECONDS if every is None else every
        self._pending: dict[str, dict[int, np.ndarray]] = {}
        self._due = time.monotonic() + self.every

    def rows(self, name: str, loaded: LoadedModel, inputs: object) -> Rows:
        """The pieces of a stage of a dense model. `inputs` is all that they depend on beside it, see `digest`.

        Raises RunError for a file that is damaged.
        """
        return Rows(self, self._key(name, loaded, inputs))

    def state(self, name: str, loaded: LoadedModel, inputs: object) -> State:
        """The stand of one walk through the layers of a dense model; as `rows`."""
        return State(self, self._key(name, loaded, inputs))

    @property
    def keeps(self) -> bool:
        return self.folder is not None

    @property
    def due(self) -> bool:
        """Whether it is time to write."""
        return self.keeps and time.monotonic() >= self._due

    def add(self, key: str, number: int, row: np.ndarray) -> None:
        """One more row, written with all others when it is time."""
        if self.keeps:
            self._pending.setdefault(key, {})[number] = row
            if self.due:
                self.flush()

    def flush(self) -> None:
        """Write every row that waits."""
        begun = time.monotonic()
        while self._pending:
            key, rows = self._pending.popitem()
            self._write(f"{key}.{min(rows)}-{len(rows)}", {str(number): row for number, row in rows.items()})
        self._rest(begun)

    def replace(self, key: str, arrays: Arrays) -> None:
        """Write a state in the place of its earlier stand. What was measured by means of older states is written first,
        because they may have to go.
        """
        self.flush()
        begun = time.monotonic()
        self._write(key, arrays)
        self._rest(begun)
        with contextlib.suppress(FileNotFoundError):  # as in `_write`
            facts = {path: path.stat() for path in self._files("state-*")}
            room = STATES_BYTES
            for path in sorted(facts, key=lambda path: facts[path].st_mtime, reverse=True):
                room -= facts[path].st_size
                if room < 0 and path.stem != key:
                    path.unlink()

    def found(self, key: str) -> Iterator[Arrays]:
        """The content of every file under a key."""
        for path in self._files(f"{key}{SUFFIX}", f"{key}.*{SUFFIX}"):
            yield from _read(path)

    def clear(self, *, remove: bool = True) -> None:
        """What was kept has served its purpose. Under torchrun all forget what waits, and one may `remove` files."""
        self._pending.clear()
        if remove and self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _key(self, name: str, loaded: LoadedModel, inputs: object) -> str:
        return f"{name}-{digest([identity_of(loaded), name, inputs])}" if self.keeps else name

    def _files(self, *patterns: str) -> list[Path]:
        if self.folder is None:
            return []
        return sorted(path for pattern in patterns for path in self.folder.glob(pattern) if path.is_file())

    def _write(self, name: str, arrays: Arrays) -> None:
        assert self.folder is not None  # noqa: S101 (nothing waits without a folder)
        whole = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
        # Another run of the same request may have finished, and have removed what neither of them needs.
        with contextlib.suppress(FileNotFoundError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / f"{name}{SUFFIX}", pieces_of(whole, {"sha256": _content(whole)}))

    def _rest(self, begun: float) -> None:
        now = time.monotonic()
        self._due = now + (max(self.every, REST * (now - begun)) if self.every else 0.0)


class Rows:
    """An array for each numbered piece of a stage: found, or measured now and kept."""

    def __init__(self, journal: Journal, key: str) -> None:
        self._journal, self._key = journal, key
        found = journal.found(key)
        self._found = {int(number): row for arrays in found for number, row in arrays.items()}

    def __contains__(self, number: int) -> bool:
        return number in self._found

    def take(self, number: int) -> np.ndarray:
        """What was found, once."""
        return self._found.pop(number)

    def keep(self, number: int, row: np.ndarray) -> None:
        self._journal.add(self._key, number, row)

    def of(self, number: int, measure: Callable[[], np.ndarray]) -> np.ndarray:
        """The row of a piece."""
        if number in self._found:
            return self.take(number)
        row = measure()
        self.keep(number, row)
        return row


class State:
    """Where a walk through the layers stands: arrays by name, each stand in the place of the one before."""

    def __init__(self, journal: Journal, key: str) -> None:
        self._journal, self._key = journal, f"state-{key}"

    def read(self) -> Arrays | None:
        """The last stand that was kept, None without any."""
        return next(self._journal.found(self._key), None)

    def keep(self, stand: Callable[[], Arrays]) -> None:
        """Keep a stand if it is time to; `stand` is called only then."""
        if self._journal.due:
            self._journal.replace(self._key, stand())


_current: ContextVar[Journal] = ContextVar("journal", default=Journal())  # noqa: B039 (it keeps nothing)


def current() -> Journal:
    """The journal of the run, or one that keeps nothing."""
    return _current.get()


@contextlib.contextmanager
def keeping(journal: Journal) -> Iterator[None]:
    """Whatever runs inside is kept in `journal`; what waits when it is interrupted is written."""
    token = _current.set(journal)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # the reason why it ends is told, and this may be the same one
            journal.flush()
        raise
    finally:
        _current.reset(token)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[Journal]:
    """A journal in `folder` for one run at a time; while another run has it, one that keeps nothing.

    At a clean end the folder is removed, and after a refusal, which would come again. Whatever else ends the run leaves
    it for the next one, with what waited to be written.
    """
    made = [place for place in folder.parents if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock_of(folder)
    try:
        lock.acquire(timeout=0)
    except OSError:  # a Timeout is one, and the folder may be removed at this moment
        yield Journal()
        return
    journal = Journal(folder)
    try:
        yield journal
    except BaseException as error:
        refused = isinstance(error, (InputError, GateError))
        if not refused:
            with contextlib.suppress(OSError):  # as in `keeping`, which has ended where it is the proof that did
                journal.flush()
        lock.release()
        if refused or not holds_work(folder):
            _remove(folder, lock)
            with contextlib.suppress(OSError):  # something else lies in them by now
                for place in made:
                    place.rmdir()
        raise
    _remove(folder, lock)


def holds_work(folder: Path) -> bool:
    """Whether an interrupted run left something in `folder` or below it that the next one goes on with."""
    if not [*folder.glob(f"*{SUFFIX}"), *folder.glob(f"*/*{SUFFIX}")]:
        return False
    if not (folder / LOCK).exists():  # a toolkit's, whose stages several processes may share
        return True
    try:
        with _lock_of(folder).acquire(timeout=0):
            return True
    except OSError:  # the run is not interrupted
        return False


def remove_old(place: Path) -> None:
    """Remove what interrupted runs left in `place` when nothing in it has changed for KEPT_DAYS."""
    oldest = time.time() - KEPT_DAYS * DAY_SECONDS
    for folder in place.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another run has it, or has removed it
            if max(path.stat().st_mtime for path in (folder, *folder.rglob("*"))) < oldest:
                lock = _lock_of(folder)
                lock.acquire(timeout=0)
                _remove(folder, lock)


def _lock_of(folder: Path) -> FileLock:
    return FileLock(folder / LOCK, thread_local=False)


def _remove(folder: Path, lock: FileLock) -> None:
    """The lock goes first: Windows keeps files that are open."""
    lock.release()
    shutil.rmtree(folder, ignore_errors=True)


def versions() -> tuple[str, ...]:
    """Of what computes."""
    return sspcompile.__version__, torch.__version__, transformers.__version__, np.__version__


def identity_of(loaded: LoadedModel) -> list[object]:
    """What every number depends on that a dense model computes from the same text, down to its last bit."""
    machine = (loaded.device.type, torch.get_num_threads(), torch.backends.cpu.get_cpu_capability())
    template = template_digest(loaded.tokenizer, loaded.rendering)
    return [loaded.fingerprint, str(loaded.model.dtype), template, *versions(), *machine]


def digest(inputs: object) -> str:
    """Of numbers, texts, arrays, tensors, dataclasses and lists or mappings of them: 16 hex digits."""
    return hashlib.sha256(json.dumps(inputs, default=_plain).encode()).hexdigest()[:16]


def _plain(value: object) -> object:
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        content = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return [str(value.dtype), list(value.shape), content]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"{type(value).__name__} has no digest")


def _content(arrays: Arrays) -> str:
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        found.update(arrays[name].data if arrays[name].size else b"")
    return found.hexdigest()


def _read(path: Path) -> Iterator[Arrays]:
    """The arrays of a file; nothing if it was removed meanwhile. Raises RunError when it is damaged."""
    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            stated = (file.metadata() or {}).get("sha256")
    except FileNotFoundError:
        return
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error
    if stated != _content(arrays):
        raise _damaged(path, "its content is not what was written")
    yield arrays


def _damaged(path: Path, reason: str) -> RunError:
    return RunError(f"{path} cannot be read: {reason}.", hint=f"Remove {path.parent}, and start again.")
