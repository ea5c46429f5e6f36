"""Weights of a model in memory, wherever they lie.

A weight that lies on disk, or in memory beside a GPU, stands in its module as an empty `meta` tensor; it is real only
while its layer runs. Whoever reads weights directly asks `tensor_of` or `weight_of`, and whoever puts others in their
place for a while uses `replaced`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sspcompile.model.swapping import swapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Where accelerate keeps weights without computing there, as long as there is a GPU.
STORES = ("cpu", "disk")


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go: the device of a whole model, or the first that computes of a spread one."""
    placed: Mapping[str, Any] | None = getattr(model, "hf_device_map", None)
    if not placed:
        return model.device
    computing = [device for device in placed.values() if device not in STORES]
    return torch.device(computing[0] if computing else "cpu")


def computing_device(module: nn.Module) -> torch.device:
    """Where a module computes, wherever its weights are kept."""
    weight = _first(module)
    if not weight.is_meta:
        return weight.device
    stored = getattr(weight, "stored", None)
    if stored is not None:
        return torch.device(stored.device)
    hook: Any = module._hf_hook  # accelerate's
    return torch.device(hook.execution_device)


def tensor_of(module: nn.Module, name: str) -> Tensor | None:
    """A module's parameter, read from where it is kept if need be; None where the module has none of that name.

    It is a copy where it had to be read: writing to it changes nothing.
    """
    parameter = module._parameters.get(name)
    if parameter is None or not parameter.is_meta:
        return None if parameter is None else parameter.detach()
    stored = getattr(parameter, "stored", None)
    if stored is not None:
        found: Tensor = stored.read()
        return found
    from accelerate.utils import align_module_device

    with align_module_device(module):
        return module.get_parameter(name).detach().clone()


def weight_of(module: nn.Module) -> Tensor:
    """A module's weight, read from where it is kept if need be; see `tensor_of`."""
    weight = tensor_of(module, "weight")
    if weight is None:
        raise AttributeError(f"{type(module).__name__} has no weight")
    return weight


@contextlib.contextmanager
def present(module: nn.Module) -> Iterator[Tensor]:
    """A module's weight for the duration of the context, without a copy beside the one that accelerate brings."""
    weight = module.get_parameter("weight")
    if not weight.is_meta or hasattr(weight, "stored"):
        yield weight_of(module)
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield module.get_parameter("weight").detach()


@contextlib.contextmanager
def brought(module: nn.Module) -> Iterator[None]:
    """Bring what accelerate keeps of a module's own parameters once, for all calls inside the context.

    Its hook would bring them for every call and take them away behind it. Parameters that lie elsewhere stay there.
    """
    own = next((parameter for parameter in module._parameters.values() if parameter is not None), None)
    if own is None or not own.is_meta or hasattr(own, "stored"):
        yield
        return
    from accelerate.utils import align_module_device

    hook: Any = module._hf_hook
    with align_module_device(module):
        hook.offload = False  # calls find the parameters there, and leave them
        try:
            yield
        finally:
            hook.offload = True


@contextlib.contextmanager
def replaced(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Other parameters in a module for the duration of the context, wherever its own are kept.

    A bias may be put where there is none.
    """
    own = _first(module)
    device, dtype = computing_device(module), own.dtype
    given = {name: nn.Parameter(tensor.to(device, dtype), requires_grad=False) for name, tensor in tensors.items()}
    if own.is_meta and not hasattr(own, "stored"):
        # accelerate brings the module's own parameters right before they are used, and takes them away behind that.
        forward: Any = module._old_forward
        if isinstance(forward, partial) and forward.func is _run_with:
            # A context around this one: what it put there counts less.
            _, others, forward = forward.args
            given = {**others, **given}
        with swapped(module, partial(_run_with, module, given, forward), "_old_forward"):
            yield
    else:
        with _put(module, given):
            yield


@contextlib.contextmanager
def _put(module: nn.Module, given: Mapping[str, nn.Parameter]) -> Iterator[None]:
    own = {name: module._parameters.get(name) for name in given}
    module._parameters.update(given)
    try:
        yield
    finally:
        module._parameters.update(own)


def _run_with(
    module: nn.Module, given: Mapping[str, nn.Parameter], forward: Callable[..., Any], *args: Any, **options: Any
) -> Any:
    with _put(module, given):
        return forward(*args, **options)


def _first(module: nn.Module) -> nn.Parameter:
    """Any parameter of a module's own: they are of one dtype, and kept in one place."""
    return next(parameter for parameter in module._parameters.values() if parameter is not None)
