"""Models larger than one device: accelerate spreads the layers over GPUs, memory and disk, and moves what passes by.

A weight that lies in memory or on disk stands in its module as an empty `meta` tensor; it is real only while its module
runs. Whoever reads weights directly asks `weight_of`.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sspcompile.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
# Where accelerate keeps weights without computing there, as long as there is a GPU.
STORES = ("cpu", "disk")


def loading_options(device_map: str | None) -> dict[str, Any]:
    """What `from_pretrained` needs to spread a model; nothing for None. Raises InputError without accelerate."""
    if device_map is None:
        return {}
    if device_map not in DEVICE_MAPS:
        raise InputError(f"There is no device map {device_map!r}.", hint=f"Accepted: {', '.join(DEVICE_MAPS)}.")
    if importlib.util.find_spec("accelerate") is None:
        raise InputError("--device-map needs accelerate.", hint="Install it: pip install accelerate.")
    # Only files that are not safetensors are copied there.
    return {"device_map": device_map, "offload_folder": tempfile.gettempdir()}


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go: the device of a whole model, or the first that computes of a spread one."""
    placed: Mapping[str, Any] | None = getattr(model, "hf_device_map", None)
    if not placed:
        return model.device
    computing = [device for device in placed.values() if device not in STORES]
    return torch.device(computing[0] if computing else "cpu")


def weight_of(module: nn.Module) -> Tensor:
    """A module's weight, read from where it is kept if need be. It is a copy then: writing to it changes nothing."""
    weight = module.get_parameter("weight")
    if not weight.is_meta:
        return weight.detach()
    from accelerate.utils import align_module_device

    with align_module_device(module):
        return module.get_parameter("weight").detach().clone()
