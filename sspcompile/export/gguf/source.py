"""What a GGUF is written from, read from a model folder: dense, uniform or with counts per layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sspcompile.checkpoint.headers import TensorInfo
from sspcompile.checkpoint.references import without_code
from sspcompile.checkpoint.settings import read_json
from sspcompile.checkpoint.source import demand_shapes, named_tensors
from sspcompile.checkpoint.tensors import EMBEDDING, FINAL_NORM, LM_HEAD, attention_shapes, mlp_shapes
from sspcompile.checkpoint.tied import untied_by_weights
from sspcompile.errors import CheckpointError
from sspcompile.families import Geometry, GgufModel, geometry_of, gguf_model, layer_prefix, positions_of, stand_in

# Only how per-layer folders are opened; they say nothing of what a layer computes.
OPENING_KEYS = ("per_layer_config", "auto_map", "allow_global_per_layer_attribute_access")


@dataclass(frozen=True)
class Source:
    """A model folder and the form in which llama.cpp holds it. `context`: its longest text in tokens.

    `carried`: the configuration that goes along, by which transformers finds the class of the tokenizer.
    """

    folder: Path
    config: Mapping[str, Any]
    geometry: Geometry
    tensors: Mapping[str, TensorInfo]
    model: GgufModel
    epsilon: float
    context: int
    carried: Mapping[str, Any]

    @property
    def dtypes(self) -> set[str]:
        """The dtypes of its matrices."""
        return {info.dtype for info in self.tensors.values() if len(info.shape) == 2}

    def with_tensors(self, others: Mapping[str, TensorInfo]) -> Source:
        """The same with `others` in the places of its own tensors of those names and shapes."""
        return replace(self, tensors={**self.tensors, **others})


def read_source(folder: Path) -> Source:
    """Read configuration and headers.

    Raises UnsupportedModelError for what llama.cpp does not hold, and CheckpointError for files that contradict each
    other.
    """
    config = read_json(folder / "config.json")
    by_layer = config.get("per_layer_config") or {}
    plain = {key: value for key, value in config.items() if key not in OPENING_KEYS}
    if by_layer:  # the global counts are the largest of any layer, and need not fit each other
        plain["num_attention_heads"] = plain["num_key_value_heads"]
    stated = geometry_of(plain)
    tensors = named_tensors(folder, config, stated)
    g = untied_by_weights(stated, tensors)
    told = [by_layer.get(str(index), {}) for index in range(g.layers)]
    counts = [(one.get("num_attention_heads", g.heads), one.get("num_key_value_heads", g.kv_heads)) for one in told]
    widths = [one.get("intermediate_size", g.intermediate) for one in told]
    used = {name: info for name, info in tensors.items() if not (g.tied and name == LM_HEAD)}
    model = gguf_model(plain, g, counts, widths, {info.dtype for info in used.values()})
    _check(used, g, model, folder)
    carried = without_code(config if by_layer else stand_in(config) or config)
    longest = {"max_position_embeddings": g.family.silent["max_position_embeddings"], **plain}
    context = positions_of(longest)
    if context is None:
        raise CheckpointError(
            f"config.json has {longest['max_position_embeddings']!r:.60} as max_position_embeddings.",
            hint="It must be a whole number of at least 1.",
        )
    return Source(folder, plain, g, used, model, _epsilon(plain, g), context, carried)


def _epsilon(config: Mapping[str, Any], g: Geometry) -> float:
    value = config.get("rms_norm_eps", g.family.silent["rms_norm_eps"])
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"config.json has rms_norm_eps = {value!r:.60}.", hint="rms_norm_eps must be a number.")
    return float(value)


def _check(tensors: Mapping[str, TensorInfo], g: Geometry, model: GgufModel, folder: Path) -> None:
    """Every tensor that will be written is there, in the shape that its layer's counts ask for."""
    wanted: dict[str, tuple[int, ...]] = {EMBEDDING: (g.vocab, g.hidden), f"{FINAL_NORM}.weight": (g.hidden,)}
    if not g.tied:
        wanted[LM_HEAD] = (g.vocab, g.hidden)
    for index, ((heads, kv_heads), width) in enumerate(zip(model.counts, model.widths, strict=True)):
        wanted |= attention_shapes(g, index, heads, kv_heads)
        wanted |= mlp_shapes(g, index, width)
        wanted |= {f"{layer_prefix(index)}{norm}.weight": (g.hidden,) for norm in g.family.norms}
    demand_shapes(folder, tensors, wanted)
