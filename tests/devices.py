"""Devices that a machine need not have: tensors that say where they are, computed on the CPU.

What PyTorch refuses on real devices fails here as well: an operation on tensors of two devices, an index that lies on
another one, and float64 where there is none. Run as a program, so that no other test sees a device that is not there.
It prints a JSON object: for `spread` (two GPUs that share a model) and for `single` (one device without float64, as
Apple's are) what became of each computation: null, or what went wrong.
"""

from __future__ import annotations

import json
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from test_prepare_tools import tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from sspcompile.criteria import CRITERIA, bonsai, fisher
from sspcompile.criteria.channels import structure_moments
from sspcompile.criteria.flap import flap_structures
from sspcompile.criteria.llm_pruner import llm_pruner_structures
from sspcompile.criteria.magnitude import magnitude_structures
from sspcompile.criteria.units import CriterionInput
from sspcompile.criteria.wanda import wanda_structures
from sspcompile.evaluate.answers import answer_scores, encode_items
from sspcompile.model import stored
from sspcompile.model.capture import features
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.divergence import DivergenceAccumulator
from sspcompile.model.text import Sentence, batches_of
from sspcompile.repair.biases import fit_biases
from sspcompile.repair.fitting import fit_repairs
from sspcompile.slicing.mask import Kept

NAME = "elsewhere"
ANY = f"{NAME}:0"
PROMPTS = ["tell me about acid ?", "what is the sum of a prime and a root ?"]
ATEN = torch.ops.aten
COPIES = {ATEN._to_copy, ATEN.copy_, ATEN.to}
# Operations whose indices may lie on the CPU, whatever device the rest is on.
INDEXED = {ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_}
doubles = True


class Elsewhere(Tensor):
    """A tensor that says it is at `place`; `inner` has its numbers.

    To PyTorch's own code all are on ANY, the one device that its autograd has a queue for. It makes some gradients
    there, which may meet whatever there is.
    """

    inner: Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, inner: Tensor, place: torch.device) -> Elsewhere:
        shape = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        found = Tensor._make_wrapper_subclass(cls, inner.size(), device=ANY, **shape)
        found.inner, found.place = inner, place
        return found

    @property
    def device(self) -> torch.device:
        return self.place

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):  # to PyTorch's own code it would be there already
            args = (args[0].device, args[0].dtype, *args[1:])
        return super().to(*args, **kwargs)

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class Devices(TorchDispatchMode):
    """Inside, tensors can be made on devices that are not there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    device = where(func, args, given)
    wanted = [one for one in (*args, kwargs.get("device")) if isinstance(one, torch.device)]
    device = wanted[0] if wanted else device
    found = func(*tree_map(bare, args), **tree_map(bare, kwargs))
    return tree_map(lambda one: placed(one, device) if isinstance(one, Tensor) else one, found)


def where(func: Any, args: Any, given: list[Tensor]) -> torch.device:
    """The one device of all that an operation is given. A number may lie on the CPU, and so may indices."""
    if func.overloadpacket in COPIES:
        return given[0].device
    if func.overloadpacket in INDEXED:
        given = [args[0], *(one for one in given[1:] if one.device.type != "cpu")]
    matter = [one for one in given if one.dim() or one.device.type != "cpu"] or given
    devices = {str(one.device) for one in matter} - ({ANY} if len(matter) > 1 else set())
    if len(devices) > 1 and threading.current_thread() is not threading.main_thread():
        return torch.device(ANY)  # autograd, to which a copy from one device to another is none: they are all ANY
    if len(devices) > 1:
        raise RuntimeError(f"{func} on {sorted(devices)}")
    return torch.device(next(iter(devices), ANY if matter else "cpu"))


def bare(one: Any) -> Any:
    if isinstance(one, torch.device):
        return torch.device("cpu")
    return one.inner if isinstance(one, Elsewhere) else one


def placed(one: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return one
    if one.dtype == torch.float64 and not doubles:
        raise TypeError(f"{device} has no float64")
    with torch.inference_mode(False):  # inference tensors that wrap others have no views
        return Elsewhere(one, device)


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def move(loaded: LoadedModel, devices: list[str]) -> LoadedModel:
    """Embeddings on the first device, layers in turn, norm and head on the last."""
    model: Any = loaded.model
    model.config._attn_implementation = "eager"  # whose operations are the plain ones
    places: dict[str, str] = {"model.embed_tokens": devices[0], "model.rotary_emb": devices[0]}
    places |= {f"model.layers.{index}": devices[index % len(devices)] for index in range(len(loaded.layers))}
    places |= {"model.norm": devices[-1], "lm_head": devices[-1]}
    for name, device in places.items():
        for module in model.get_submodule(name).modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[key] = nn.Parameter(parameter.detach().to(device), requires_grad=False)
            for key, buffer in module._buffers.items():
                module._buffers[key] = buffer.to(device)
        if len(devices) > 1:  # what accelerate does where a model is spread
            add_hook_to_module(model.get_submodule(name), AlignDevicesHook(torch.device(device)))
    model.hf_device_map = places
    return loaded


def computations(loaded: LoadedModel) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What reads weights or hidden states of a model, by name: each gives numbers."""
    g = loaded.geometry
    ids = [tuple(loaded.tokenizer(text)["input_ids"]) for text in PROMPTS]
    batches = batches_of(loaded, [Sentence((*one, 7, 8), len(one)) for one in ids], 16)
    directions = np.random.default_rng(3).normal(size=(g.layers, 2, g.hidden))
    given = CriterionInput(batches, len(PROMPTS), directions / np.linalg.norm(directions, axis=-1, keepdims=True))
    for name, entry in CRITERIA.items():
        yield name, lambda entry=entry: entry.measure(loaded, replace(given))
    yield "magnitude of structures", lambda: magnitude_structures(loaded).channels
    yield "llm-pruner of structures", lambda: llm_pruner_structures(loaded, given).channels
    yield "flap of structures", lambda: flap_structures(loaded, *structure_moments(loaded, given)).channels
    yield "wanda of structures", lambda: wanda_structures(loaded, *structure_moments(loaded, given)).channels
    yield "features", lambda: features(loaded, PROMPTS)
    questions = [SimpleNamespace(prompt=text, answer="a metal") for text in PROMPTS]
    yield "answers", lambda: answer_scores(loaded, encode_items(loaded, questions)).log_likelihood
    yield "divergence", lambda: diverged(loaded, batches)
    heads, channels = np.ones((g.layers, g.heads), bool), np.ones((g.layers, g.intermediate), bool)
    heads[0, 1], channels[0, 3], channels[2, 1] = False, False, False
    layers = np.array([True, False, True])
    for name, kept in (
        ("heads", Kept(heads)),
        ("channels", Kept(heads, channels)),
        ("layers", Kept(heads, channels, layers)),
    ):
        yield f"repair of {name}", lambda kept=kept: repaired(loaded, kept, batches)
        yield f"biases of {name}", lambda kept=kept: fitted_biases(loaded, kept, batches)


def mixes(device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What PyTorch refuses."""
    ones = torch.ones(2)
    yield "a sum with what lies on the CPU", lambda: (ones.to(device) + ones).cpu()
    yield "an index that lies elsewhere", lambda: ones[torch.ones(2, device=device).bool()]
    yield "an array of what lies elsewhere", lambda: ones.to(device).numpy()
    if not doubles:
        yield "float64", lambda: ones.to(device).double().cpu()


def diverged(loaded: LoadedModel, batches: Any) -> list[float]:
    found = DivergenceAccumulator()
    for batch in batches:
        logits = loaded.scored_logits(batch.input_ids, batch.attention_mask, batch.score_mask)
        references = torch.arange(len(logits)).remainder(3).sub(1)
        prompts = torch.arange(len(logits)) + 100 * batch.rows[0]
        found.add(logits, logits * 1.1, prompts, references)
    result = found.result()
    return [*result.kl_per_prompt, *result.reference_per_prompt]


def repaired(loaded: LoadedModel, kept: Kept, batches: Any) -> np.ndarray:
    (found,) = fit_repairs(loaded, [kept], batches, dtype=torch.float32, mlp=True)
    every = [*found.weights.values(), *found.down.values()]
    return torch.cat([one.cpu().flatten() for one in every]).numpy()


def fitted_biases(loaded: LoadedModel, kept: Kept, batches: Any) -> np.ndarray:
    (found,) = fit_biases(loaded, [kept], batches, dtype=torch.float32, anywhere=True)
    return torch.cat([one.flatten() for one in found.biases.values()]).numpy()


def failure(compute: Callable[[], Any], expected: np.ndarray) -> str | None:
    try:
        found = np.asarray(compute())
    except Exception:  # noqa: BLE001 (what it is, is the result)
        return traceback.format_exc()
    near = np.allclose(found, expected, rtol=1e-4, atol=1e-6 * max(1e-30, np.abs(expected).max()))
    return None if near else f"{found} is not {expected}"


def arranged(model: Callable[[], LoadedModel], devices: list[str], expected: dict[str, np.ndarray]) -> dict[str, Any]:
    """For each computation of a model on these devices None, or what went wrong."""
    with Devices():
        for name, compute in mixes(devices[0]):
            assert failure(compute, np.ones(2)), f"{name} was not refused"
        moved = move(model(), devices)
        return {name: failure(compute, expected[name]) for name, compute in computations(moved)}


def main() -> dict[str, dict[str, Any]]:
    global doubles
    _setup_privateuseone_for_python_backend(NAME, Backend())
    # What is repeated is the same on every device.
    fisher.ROUND_DRAWS, fisher.ROUNDS, bonsai.MOST_MASKS = 1, 2, 4
    model = partial(tiny, "qwen2", heads=2, kv_heads=1, seed=2)
    expected = {name: np.asarray(compute()) for name, compute in computations(model())}
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes them on the CPU, and moves them as others are
    drawn = torch.Generator
    torch.Generator = lambda device: drawn()  # type: ignore[misc, assignment]
    spread = arranged(model, [f"{NAME}:1", f"{NAME}:2"], expected)
    doubles, stored.WITHOUT_DOUBLES = False, frozenset({NAME})  # type: ignore[misc]
    return {"spread": spread, "single": arranged(model, [f"{NAME}:1"], expected)}


if __name__ == "__main__":
    print(json.dumps(main()), flush=True)
    os._exit(0)  # the threads of autograd do not end by themselves
