"""Where a model is computed: device, dtype, memory and threads.

A `Placement` is no part of a build's request: a request says what comes out, a placement where it is worked out.
"""

from __future__ import annotations

import gc
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict

from sspcompile.errors import InputError
from sspcompile.machine import free_memory, resident_bytes, usable_cores
from sspcompile.request.options import AUTO, flag, variable
from sspcompile.request.sizes import byte_size

if TYPE_CHECKING:
    import torch

DEVICE = r"auto|cpu|mps|cuda(:\d{1,3})?"
DTYPES = ("float32", "bfloat16", "float16")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
NAMES = ("device", "dtype", "device_map", "memory", "threads")
MOST_THREADS = 4096


class Placing(TypedDict, total=False):
    """The keywords by which a `Placement` is asked for: `memory` in bytes, or as text such as "8GB"."""

    device: str | None
    dtype: str | None
    device_map: str | None
    memory: int | str | None
    threads: int | None


@dataclass(frozen=True)
class Placement:
    """Where to compute, as it was asked for; `resolve` settles what is left open.

    `device`: auto, cpu, cuda, cuda:N or mps. `dtype`: auto or one of DTYPES. `device_map`: one of DEVICE_MAPS, which
    spreads a model over several devices. `memory`: a limit in bytes, None for what is free. `threads`: None for as many
    as this process may use.
    """

    device: str = AUTO
    dtype: str = AUTO
    device_map: str | None = None
    memory: int | None = None
    threads: int | None = None

    @property
    def on_cuda(self) -> bool:
        """Whether a CUDA device was asked for by name."""
        return self.device.startswith("cuda")

    @property
    def exact_device(self) -> str:
        """Where float64 is computed: on a CUDA device that was named, on the CPU otherwise. Another GPU need not have
        it."""
        return self.device if self.on_cuda else "cpu"

    def half(self) -> Placement:
        """The same for one of two models: half of what a stated limit leaves beside what is held now.

        Raises InputError for a device that is not there.
        """
        if self.memory is None:
            return self
        import torch

        held = held_bytes(torch.device(_present(self.device)))
        return replace(self, memory=held + max(1, (self.memory - held) // 2))


# What proofs and exports are held against, and what a model in memory means where nothing else is said.
ON_CPU = Placement(device="cpu", dtype="float32")
# Whatever the machine has.
ANYWHERE = Placement()


def placement_of(
    given: Mapping[str, Any], environment: Mapping[str, str], call: Callable[[str], str] = flag
) -> Placement:
    """A Placement from what was `given` (flags or keywords; None is "not given"), then from the environment.

    Sizes are numbers of bytes or text such as "8GB". Errors call names as `call` does. Raises InputError for what no
    machine could have.
    """
    found: dict[str, Any] = {}
    for name in NAMES:
        value, label = given.get(name), call(name)
        if value is None and (text := environment.get(variable(name), "").strip()):
            value, label = text, variable(name)
        if value is not None:
            found[name] = _checked(name, value, label)
    return Placement(**found)


def _checked(name: str, value: Any, label: str) -> Any:
    if name == "memory":
        return byte_size(str(value), label)
    if name == "threads":
        if not str(value).isdecimal() or not 1 <= int(value) <= MOST_THREADS:
            raise InputError(f"{label} is {value}.", hint=f"Give a whole number from 1 to {MOST_THREADS}.")
        return int(value)
    if name == "device" and not re.fullmatch(DEVICE, str(value)):
        raise InputError(f"There is no device {str(value)!r}.", hint="Accepted: auto, cpu, cuda, cuda:N, mps.")
    if name == "dtype" and value not in (AUTO, *DTYPES):
        raise InputError(f"Nothing is computed in {str(value)!r}.", hint=f"Accepted: {', '.join((AUTO, *DTYPES))}.")
    if name == "device_map" and value not in DEVICE_MAPS:
        raise InputError(f"There is no device map {str(value)!r}.", hint=f"Accepted: {', '.join(DEVICE_MAPS)}.")
    return value


@dataclass(frozen=True)
class Place:
    """Where a model is computed, settled. `memory`: bytes that its weights and its work may take beside what is held
    now; `limited`: whether somebody stated that."""

    device: torch.device
    dtype: torch.dtype
    device_map: str | None
    memory: int
    limited: bool
    threads: int

    def facts(self) -> dict[str, str]:
        """What a manifest says of it."""
        device = self.device.type if self.device_map is None else f"{self.device.type}, spread"
        return {"device": device, "dtype": str(self.dtype).removeprefix("torch."), "threads": str(self.threads)}


def resolve(placement: Placement, dtype: torch.dtype | None = None) -> Place:
    """The place that a placement means here and now; `dtype` overrules what it says.

    `auto` is the accelerator that is there: cuda, then mps, then cpu; under torchrun each process has its own. It
    computes in float32 on the CPU, in bfloat16 on CUDA devices that have it, in float16 elsewhere. Raises InputError
    for a device that is not there.
    """
    import torch

    device = torch.device(_present(placement.device))
    named: torch.dtype = getattr(torch, placement.dtype if placement.dtype != AUTO else _usual(device))
    memory = free_bytes(device) if placement.memory is None else placement.memory - held_bytes(device)
    threads = placement.threads or min(torch.get_num_threads(), usable_cores())
    return Place(device, dtype or named, placement.device_map, memory, placement.memory is not None, threads)


def free_bytes(device: torch.device) -> int:
    """What tensors on a device can still take: of a CUDA device, or of the machine. The memory of a Mac is one."""
    import torch

    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_memory()


def held_bytes(device: torch.device) -> int:
    """What this process holds now: tensors on a CUDA device, or all that it has in the memory of the machine."""
    import torch

    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else resident_bytes()


def release() -> None:
    """Give back the memory of models that nobody refers to any more.

    To be called behind the `del` that is to make room: modules refer to each other in circles, which only the collector
    ends, and torch keeps blocks of a GPU that were freed.
    """
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def wait_for(*devices: torch.device) -> None:
    """Wait until devices have done what they were given: on a GPU a call only queues it."""
    import torch

    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()


def devices_here() -> tuple[str, ...]:
    """The devices of this machine, the one that `auto` takes first."""
    import torch

    cuda = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return (*cuda, *(["mps"] if torch.backends.mps.is_available() else []), "cpu")


def _present(wanted: str) -> str:
    # Options alone need no torch.
    from sspcompile.model.parallel import current

    here = devices_here()
    world = current()
    if world.size > 1 and wanted in (AUTO, world.device.partition(":")[0]):
        return world.device
    if wanted == AUTO:
        return here[0]
    if wanted not in (*here, *(name.partition(":")[0] for name in here)):
        raise InputError(f"This machine has no device {wanted!r}.", hint=f"It has {', '.join(reversed(here))}.")
    return wanted


def _usual(device: torch.device) -> str:
    import torch

    if device.type == "cpu":
        return "float32"
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float16"


def use_threads(placement: Placement) -> None:
    """Let torch, and what numpy and scipy multiply with, use as many threads as were asked for.

    Without a number they keep theirs, except where that is more than this process has cores.
    """
    import torch
    from threadpoolctl import threadpool_info, threadpool_limits

    cores, wanted = usable_cores(), placement.threads
    if wanted is not None or torch.get_num_threads() > cores:
        torch.set_num_threads(wanted or cores)
    if wanted is not None or any(pool["num_threads"] > cores for pool in threadpool_info()):
        threadpool_limits(wanted or cores)


def loading_options(place: Place) -> dict[str, Any]:
    """What `from_pretrained` needs to spread a model; nothing for one device."""
    if place.device_map is None:
        return {}
    # Only files that are not safetensors are copied there.
    options: dict[str, Any] = {"device_map": place.device_map, "offload_folder": tempfile.gettempdir()}
    if place.limited:
        import torch

        gpus = {number: int(torch.cuda.mem_get_info(number)[0]) for number in range(torch.cuda.device_count())}
        options["max_memory"] = {**gpus, "cpu": max(1, place.memory)}
    return options
