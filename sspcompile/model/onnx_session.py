"""A decoder in ONNX Runtime: prefill and steps, over a cache that is allocated once."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sspcompile.errors import ArtifactError, InputError, RunError
from sspcompile.machine import usable_cores
from sspcompile.request.amounts import largest_within

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue

GRAPH, SETTINGS = "model.onnx", "genai_config.json"
# Which sizes an export of a nested model has graphs of.
SIZES = "sizes.json"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
NUMPY: Mapping[str, type[np.floating]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass
class Cache:
    """Keys and values of every layer, [B, kv heads, capacity, D], which the graph reads and writes in place.

    `mask` [B, T] are the columns that were read so far, zeros at padding.
    """

    buffers: dict[str, OrtValue]
    mask: np.ndarray

    @property
    def length(self) -> int:
        return self.mask.shape[1]


class OnnxModel:
    """A folder that `sspcompile export --format onnx` wrote, open in a session of its own."""

    def __init__(self, session: InferenceSession, device: str, settings: Settings | None = None) -> None:
        """`settings` say what the graph leaves open: how long a text may be, and with some exporters the head size."""
        self.session = session
        self.device = device
        self._settings = settings
        self._past = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        size: float | None = None,
        provider: str = "cpu",
        threads: int | None = None,
        spin: bool = False,
    ) -> OnnxModel:
        """Open MODEL.onnx of a folder, or the graph of a `size`. `threads` None means the cores that this process may
        use.

        With `spin` its threads wait for work in a loop, which makes a step a little faster and, where others use the
        processor too, everything several times slower. `bench` alone asks for it.

        Raises InputError when ONNX Runtime or the provider is not installed, ArtifactError for a folder that it cannot
        open, and what `graph_of` raises.
        """
        demand_runtime()
        import onnxruntime as ort

        settings = read_settings(folder)
        if provider not in PROVIDERS or PROVIDERS[provider] not in ort.get_available_providers():
            found = ", ".join(name for name, full in PROVIDERS.items() if full in ort.get_available_providers())
            raise InputError(f"ONNX Runtime here has no {provider!r} provider.", hint=f"Accepted: {found}.")
        graph = graph_of(folder, size)
        if not (folder / graph).is_file():
            raise ArtifactError(f"{folder} holds no {graph}.", hint="Run `sspcompile export --format onnx`.")
        options = ort.SessionOptions()
        # Fatal errors only: the others are raised as well, and say the same in one line of the command line's own.
        options.log_severity_level = 4
        if not spin:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.intra_op_num_threads = threads or usable_cores()
        try:
            session = ort.InferenceSession(folder / graph, options, providers=[PROVIDERS[provider]])
        except _opening_errors() as error:
            reason = str(error).strip().splitlines()[0]
            raise ArtifactError(f"ONNX Runtime cannot open {folder}: {reason}", hint="Export it again.") from error
        demand_kernels(session, provider)
        return cls(session, provider, settings)

    @property
    def vocab(self) -> int:
        return self.session.get_outputs()[0].shape[2]

    @property
    def positions(self) -> int | None:
        """The longest text that the graph can read, padding included; None where the folder does not say."""
        return None if self._settings is None else self._settings.context_length

    def cache_shapes(self, batch: int, room: int) -> dict[str, tuple[tuple[int, ...], type[np.floating]]]:
        """Input name -> ([batch, kv heads, room, D], dtype) of every layer's keys and values."""
        stated = None if self._settings is None else self._settings.head_size
        shapes: dict[str, tuple[tuple[int, ...], type[np.floating]]] = {}
        for value in self._past:
            _, heads, _, size = value.shape
            width: Any = size if isinstance(size, int) else stated
            shapes[value.name] = (batch, heads, room, width), NUMPY[value.type]
        return shapes

    def prefill(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None, *, capacity: int | None = None
    ) -> tuple[np.ndarray, Cache]:
        """Read tokens [B, S], padded on the left or not at all; returns logits fp32 [B, S or 1, V] and the cache.

        `capacity`: columns that the cache will have room for, S by default. Raises InputError for a text that is longer
        than what the graph can read.
        """
        import onnxruntime as ort

        batch, length = input_ids.shape
        mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
        room = max(length, capacity or 0)
        buffers = {
            name: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), self.device, 0)
            for name, (shape, dtype) in self.cache_shapes(batch, room).items()
        }
        cache = Cache(buffers, np.zeros((batch, 0), dtype=np.int64))
        return self._run(input_ids, mask, cache), cache

    def step(self, tokens: np.ndarray, cache: Cache) -> np.ndarray:
        """Read one more token per row, [B]; returns logits fp32 [B, V]. Raises InputError when the cache or the context
        is full."""
        column = np.ones((len(tokens), 1), dtype=np.int64)
        return self._run(tokens[:, None], column, cache)[:, 0]

    def _run(self, input_ids: np.ndarray, new_mask: np.ndarray, cache: Cache) -> np.ndarray:
        mask = np.concatenate([cache.mask, new_mask.astype(np.int64)], axis=1)
        room = next(iter(cache.buffers.values())).shape()[2]
        # The kernel reads positions from a table: beyond its end it fails, and padding counts.
        if self.positions is not None and mask.shape[1] > self.positions:
            raise InputError(
                f"The export reads texts of at most {self.positions} tokens, padding included, not {mask.shape[1]}.",
                hint="Give a shorter text, or export with a longer --context-length.",
            )
        if mask.shape[1] > room:
            raise InputError(f"The cache has room for {room} tokens.", hint="Ask for fewer new tokens.")
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(input_ids, dtype=np.int64))
        binding.bind_cpu_input("attention_mask", np.ascontiguousarray(mask))
        binding.bind_output("logits", "cpu")
        for name, value in cache.buffers.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values.", "present."), value)
        try:
            self.session.run_with_iobinding(binding)
        except RuntimeError as error:
            raise RunError(f"ONNX Runtime failed: {str(error).strip().splitlines()[0]}") from error
        cache.mask = mask
        return binding.get_outputs()[0].numpy()

    def demand_all_logits(self) -> None:
        """Raise InputError for a graph that computes the logits of every row's last token alone."""
        if self.session.get_outputs()[0].shape[1] == 1:
            raise InputError(
                "The export computes the logits of the last token alone, which can generate but not score a text.",
                hint="Export without --last-logits for this.",
            )

    def logits(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """Logits fp32 [B, S, V] of whole texts. Raises InputError where the graph has only those of the last token."""
        self.demand_all_logits()
        return self.prefill(input_ids, attention_mask)[0]


def demand_kernels(session: InferenceSession, provider: str) -> None:
    """Raise InputError for a graph whose attention the provider would hand to the processor, layer after layer.

    CUDA's GroupQueryAttention is registered for 16-bit floats alone (ONNX Runtime, docs/OperatorKernels.md).
    """
    caches = {value.type for value in session.get_inputs() if value.name.startswith("past_key_values.")}
    if provider == "cuda" and "tensor(float)" in caches:
        raise InputError(
            "ONNX Runtime attends in fp16 on CUDA, and this export computes in fp32.",
            hint="Export with --precision fp16, or int4 and int8 with --activations fp16.",
        )


@dataclass(frozen=True)
class Settings:
    """What genai_config.json says of a graph; None where it does not.

    `context_length`: the longest text, in tokens. `ends`: the tokens that end one.
    """

    head_size: int | None
    context_length: int | None
    ends: frozenset[int]


def graph_name(share: float) -> str:
    """The file of a size in an export of a nested model; the whole is where every export has its graph."""
    return GRAPH if share == 1 else f"model-{share:g}.onnx"


def graph_of(folder: Path, size: float | None) -> str:
    """The file of the largest of an export's sizes of at most `size`; that of the whole where None is asked for.

    Raises InputError for an export of one size, ArtifactError for a damaged sizes.json, and what `largest_within`
    raises.
    """
    if size is None:
        return GRAPH
    path = folder / SIZES
    if not path.is_file():
        raise InputError(f"{folder} holds one size.", hint="Leave --size out.")
    try:
        shares = [float(share) for share in json.loads(path.read_bytes())["sizes"]]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged.", hint="Export it again.") from error
    return graph_name(largest_within(shares, size, "the export"))


def is_onnx(folder: Path) -> bool:
    """Whether a folder holds an ONNX export."""
    return (folder / GRAPH).is_file()


def read_settings(folder: Path) -> Settings | None:
    """The genai_config.json of an export, None where there is none. Raises ArtifactError for one that is damaged."""
    path = folder / SETTINGS
    if not path.is_file():
        return None
    try:
        model = json.loads(path.read_text("utf-8"))["model"]
        sizes = (model["decoder"].get("head_size"), model.get("context_length"))
        declared = model.get("eos_token_id")
        ends = declared if isinstance(declared, list) else [] if declared is None else [declared]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is damaged.", hint="Export it again.") from error
    if not all(type(value) is int for value in (*ends, *(size for size in sizes if size is not None))):
        raise ArtifactError(
            f"{path} is damaged: head_size, context_length and end tokens must be whole numbers.",
            hint="Export it again.",
        )
    return Settings(*sizes, frozenset(ends))


def demand_runtime() -> None:
    """Raise InputError unless ONNX Runtime is installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise InputError("ONNX Runtime is not installed.", hint="Run `pip install 'sspcompile[cpu]'` (or [gpu]).")


def _opening_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises for a graph that it cannot make sense of; its classes have no common base."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented")
    return (*(getattr(state, name) for name in names), RuntimeError)
