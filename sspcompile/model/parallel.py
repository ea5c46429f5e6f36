"""Data-parallel `prepare` under torchrun: every process looks at its share of the batches, and the results are added.

Whatever prepare measures is an array with one row per prompt, and a prompt stands in one batch only. The rows of other
processes' prompts are zero, so the sum over processes is what one process alone would have found, bit for bit.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from sspcompile.errors import InputError

if TYPE_CHECKING:
    from sspcompile.model.decoder import LoadedModel

Item = TypeVar("Item")
# What torchrun tells its processes.
RANK, SIZE, LOCAL_RANK = "RANK", "WORLD_SIZE", "LOCAL_RANK"


@dataclass(frozen=True)
class World:
    """This process among `size` equal ones. Alone, every method gives back what it is given."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def share(self, batches: Sequence[Item]) -> Sequence[Item]:
        """The batches that this process looks at; in turn, because batches are sorted by length."""
        return batches[self.rank :: self.size]

    def total(self, rows: np.ndarray) -> np.ndarray:
        """The sum over all processes, known to each of them. All must call it with arrays of one shape and dtype."""
        if self.size == 1:
            return rows
        summed = torch.from_numpy(np.ascontiguousarray(rows)).to(self.device)
        torch.distributed.all_reduce(summed)
        return summed.cpu().numpy()

    def union(self, items: Mapping[int, Item]) -> dict[int, Item]:
        """The entries of all processes, known to each of them."""
        if self.size == 1:
            return dict(items)
        parts: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(parts, dict(items))
        return {key: value for part in parts for key, value in part.items()}


_worlds = [World()]


def current() -> World:
    """The world that `joined` entered, or this process alone."""
    return _worlds[-1]


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """Meet the other processes that torchrun started, with gloo on CPUs and nccl on GPUs; alone without torchrun.

    Raises InputError when there are more processes than GPUs on a machine that has some.
    """
    size = int(os.environ.get(SIZE, "1"))
    if size == 1:
        yield current()
        return
    local, devices = int(os.environ[LOCAL_RANK]), torch.cuda.device_count()
    if devices and local >= devices:
        raise InputError(
            f"torchrun started more processes than the {devices} GPUs here.", hint=f"Use --nproc-per-node {devices}."
        )
    device = f"cuda:{local}" if devices else "cpu"
    if devices:
        torch.cuda.set_device(local)  # what nccl exchanges objects through
    torch.distributed.init_process_group("nccl" if devices else "gloo")
    _worlds.append(World(int(os.environ[RANK]), size, device))
    try:
        yield current()
    finally:
        _worlds.pop()
        torch.distributed.destroy_process_group()


def shared(measure: Callable[[LoadedModel, Any], np.ndarray]) -> Callable[[LoadedModel, Any], np.ndarray]:
    """The same criterion, each process measuring its share of `look.batches`; gives every process all rows.

    For criteria that treat prompts apart: one row per prompt, and no randomness that runs on from batch to batch.
    """

    def measured(loaded: LoadedModel, look: Any) -> np.ndarray:
        world = current()
        if world.size == 1:
            return measure(loaded, look)
        return world.total(measure(loaded, replace(look, batches=world.share(look.batches))))

    return measured
