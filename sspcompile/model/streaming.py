"""A model that is larger than the memory: some of its decoder layers are read from disk whenever they run.

What does not belong to a layer (embeddings, final norm, head) stays in memory, and so do the first layers, as many as
fit. Of the others each parameter stands in its module as an empty `meta` tensor with the place where its numbers lie
(`StoredTensor`). Before such a layer runs they are read, without a memory map: mapped pages would count as resident
memory for as long as the system likes. After it they are dropped. Nothing is copied on disk.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sspcompile.checkpoint.headers import TensorInfo
from sspcompile.checkpoint.settings import read_json
from sspcompile.checkpoint.source import file_order, named_tensors
from sspcompile.checkpoint.tensors import EMBEDDING, EXPERTS_DOWN, EXPERTS_GATE_UP, LM_HEAD, ROUTER, layer_of
from sspcompile.checkpoint.tied import untied_by_weights
from sspcompile.errors import CheckpointError, InputError
from sspcompile.families import Geometry, geometry_of, layer_prefix, stand_in
from sspcompile.machine import free_memory
from sspcompile.model.opening import computing_in, open_config, readable
from sspcompile.model.placement import Place, held_bytes
from sspcompile.model.stored import BAND_BYTES, StoredTensor
from sspcompile.model.weights import brought
from sspcompile.model.working import working_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tensors = Mapping[str, TensorInfo]
# More than the work of a batch comes to in any model that is small beside it.
AMPLE_WORK = 16 << 30


def layers_that_fit(path: Path, place: Place) -> int | None:
    """How many decoder layers of a folder stay in memory; None for the whole model, read by transformers.

    A model is whole where its weights in the dtype of computing and the work of one batch (`working_bytes`) fit into
    `place.memory`. Where a limit was stated even a whole model is read tensor by tensor, because transformers maps the
    files. Raises InputError for a limit below embeddings and one layer.
    """
    width = place.dtype.itemsize
    if not place.limited and place.device.type == "cpu":
        # Two bytes of a file are a number at most. This spares the headers of whatever fits at the first glance.
        numbers = sum(file.stat().st_size for file in file_order(path)) // 2
        if numbers * width + AMPLE_WORK < place.memory:
            return None
    tensors, g = _table(path)
    sizes = [0] * g.layers
    fixed = widest = 0
    for name, info in tensors.items():
        nbytes, layer = math.prod(info.shape) * width, layer_of(name)
        if layer is not None:
            sizes[layer] += nbytes
            widest = max(widest, *info.shape)
        elif not (name == LM_HEAD and g.tied):
            fixed += nbytes
    one = max(sizes) + BAND_BYTES
    if place.limited and place.memory < fixed + one:
        least = fixed + one + held_bytes(place.device)
        raise InputError(
            f"The memory limit leaves no room for the embeddings and one layer of {path}.",
            hint=f"Give --memory {50 * math.ceil(least / 50e6)}MB or more, or a narrower --dtype.",
        )
    room = place.memory - fixed - working_bytes(g, tensors[EMBEDDING].shape[0], widest, width)
    if room >= sum(sizes):
        held = place.limited or (place.device.type != "cpu" and fixed + sum(sizes) > free_memory())
        return g.layers if held else None
    count, room = 0, room - one
    while count < g.layers and room >= sizes[count]:
        room -= sizes[count]
        count += 1
    return count


def _table(path: Path) -> tuple[Tensors, Geometry]:
    """The tensors of a dense model or of a cut, under the names of the family table."""
    config = read_json(path / "config.json")
    if config.get("per_layer_config"):  # the global counts are the largest of any layer, and need not fit each other
        plain = {key: value for key, value in config.items() if key != "per_layer_config"}
        plain["num_attention_heads"] = plain["num_key_value_heads"]
    else:
        plain = stand_in(config) or config
    g = geometry_of(plain)
    tensors = named_tensors(path, config, g)
    return tensors, untied_by_weights(g, tensors) if g.tied else g


def skeleton(
    path: Path, dtype: torch.dtype, attention: str, *, trust_remote_code: bool, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """The model of a folder without its weights, which are `meta`; what is computed and never stored is there.

    Raises CheckpointError when transformers cannot make sense of the configuration.
    """
    from transformers import AutoModelForCausalLM

    with readable(path), torch.device("meta"):
        config = open_config(path, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, trust_remote_code=trust_remote_code, **computing_in(dtype)
        ).eval()
    compute_buffers(model, device)
    return model.double() if dtype == torch.float64 else model


def compute_buffers(model: Any, device: torch.device | str) -> None:
    """What a model on `meta` computes and never stores (rotary frequencies, embedding scales), on a device."""
    for module in model.modules():
        empty = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in empty:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        if empty:
            model._init_weights(module)
        for name in empty:
            module._buffers[name] = module._buffers[name].to(device)


def open_streaming(
    path: Path, place: Place, resident: int, attention: str, *, trust_remote_code: bool
) -> PreTrainedModel:
    """The model of a folder with its first `resident` layers in memory, and the others on disk.

    Raises CheckpointError for weights that are unusable.
    """
    tensors, g = _table(path)
    model = skeleton(path, place.dtype, attention, trust_remote_code=trust_remote_code, device=place.device)
    model.requires_grad_(False)
    _read_generation_config(model, path)
    for name, infos in _sources(tensors, g).items():
        module, _, leaf = name.rpartition(".")
        owner = model.get_submodule(module)
        parameter = owner._parameters.get(leaf)
        if parameter is None:
            raise CheckpointError(f"transformers has no place for {name} of {path}.", hint="Check its config.json.")
        stored = StoredTensor(infos, parameter.shape, place.dtype, place.device)
        if not stored.finite:
            raise CheckpointError(f"{path} has infinite or undefined numbers in {name}.", hint="Download it again.")
        layer = layer_of(name)
        if layer is not None and layer >= resident:
            parameter.stored = stored  # type: ignore[attr-defined]
        else:
            owner._parameters[leaf] = nn.Parameter(stored.read(), requires_grad=False)
    if g.tied:
        model.lm_head._parameters["weight"] = model.model.embed_tokens._parameters["weight"]
    for name, parameter in model.named_parameters():
        if parameter.is_meta and not hasattr(parameter, "stored"):
            raise CheckpointError(f"{path} lacks {name}.", hint="config.json and weights must be of the same model.")
    for layer in model.model.layers[resident:]:
        layer.forward = _reading(layer, layer.forward)
    return model


def _read_generation_config(model: PreTrainedModel, path: Path) -> None:
    from transformers import GenerationConfig

    if (path / "generation_config.json").is_file():
        with readable(path):
            model.generation_config = GenerationConfig.from_pretrained(path)


def _sources(tensors: Tensors, g: Geometry) -> dict[str, tuple[TensorInfo, ...]]:
    """Parameter as transformers names it -> what it is made of. The experts of a layer are one parameter there."""
    found: dict[str, tuple[TensorInfo, ...]] = {
        name: (info,)
        for name, info in tensors.items()
        if not name.endswith("rotary_emb.inv_freq") and not (name == LM_HEAD and g.tied)
    }
    experts = g.family.experts
    if experts is None:
        return found
    for layer in g.sparse:
        prefix = layer_prefix(layer)

        def taken(number: int, part: str, prefix: str = prefix) -> TensorInfo:
            return found.pop(f"{prefix}{experts.expert.format(number)}.{part}.weight")[0]

        numbers = range(g.experts)
        found[prefix + EXPERTS_GATE_UP] = tuple(taken(number, part) for number in numbers for part in experts.gate_up)
        found[prefix + EXPERTS_DOWN] = tuple(taken(number, experts.down) for number in numbers)
        found[prefix + ROUTER] = found.pop(f"{prefix}{experts.router}.weight")
    return found


@contextlib.contextmanager
def in_memory(layer: nn.Module) -> Iterator[None]:
    """Hold the parameters of a layer that we or accelerate keep on disk: whatever runs inside reads them once.

    Parameters that somebody put in the place of a layer's own (`weights.replaced`) stay.
    """
    taken: list[tuple[nn.Module, str, nn.Parameter]] = []
    with contextlib.ExitStack() as stack:
        try:
            for module in layer.modules():
                stack.enter_context(brought(module))
                for name, parameter in module._parameters.items():
                    if parameter is not None and hasattr(parameter, "stored"):
                        module._parameters[name] = nn.Parameter(parameter.stored.read(), requires_grad=False)
                        taken.append((module, name, parameter))
            yield
        finally:
            for module, name, parameter in taken:
                module._parameters[name] = parameter


def _reading(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*args: Any, **options: Any) -> Any:
        with in_memory(layer):
            return forward(*args, **options)

    return run
