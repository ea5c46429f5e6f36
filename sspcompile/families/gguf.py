"""Which GGUF architecture holds a model of which family and layout: one answer for `plan` and for `export`.

llama.cpp has code of its own for every architecture, and takes from a file what that code asks for. What stands here
was run (llama.cpp b11434, tests/test_gguf_llama.py), and anything else is refused: a file that loads can still compute
something else.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sspcompile.errors import UnsupportedModelError
from sspcompile.families.geometry import Geometry
from sspcompile.families.positions import Positions, rope_of
from sspcompile.families.windows import stray_window, turned_layers, windows_of

Config = Mapping[str, Any]
# What weights are read from.
FLOATS = ("F32", "F16", "BF16")
SILU, GELU = "silu", "gelu_pytorch_tanh"
QKV, OUT, MLP = "qkv", "o", "mlp"
ALL_BIASES = frozenset({QKV, OUT, MLP})
# SmolLM3's code leaves every fourth layer unturned, whatever the file says.
UNTURNED_EVERY = 4
# Gemma 3's code takes this many layers for the 27B model, which scales its scores in another way.
GEMMA_27B_LAYERS = 62
MOST_LAYERS = 512
GRANITE = {
    "embedding": "embedding_multiplier",
    "attention": "attention_multiplier",
    "residual": "residual_multiplier",
    "logits": "logits_scaling",
}


@dataclass(frozen=True)
class Gguf:
    """How a model is written for one architecture of llama.cpp.

    `permuted`: the architecture turns neighbouring elements of a head by their position, transformers those half a head
    apart, so rows of q and k change places. `fused`: q, k and v lie in one matrix, without biases. `padded`: all layers
    get the counts of the widest, by heads and channels of zeros. `biases`: those that it reads. `norm_shift` is added
    to the weights of every norm. `turns`: the kinds of rotary positions that were run with it.
    """

    architecture: str
    permuted: bool = False
    fused: bool = False
    padded: bool = False
    biases: frozenset[str] = frozenset()
    norm_shift: float = 0.0
    turns: tuple[str, ...] = ("default",)
    windows: bool = False
    activation: str = SILU
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GgufModel:
    """A model as its GGUF states it: `counts` (query, key/value heads) and `widths` of the MLPs per layer.

    `query_factor` multiplies the rows of q (or q_norm, where there is one): what of the scale of scores the
    architecture has no key for. `multipliers` are Granite's that are written as they are, by the names of GRANITE.
    """

    form: Gguf
    counts: tuple[tuple[int, int], ...]
    widths: tuple[int, ...]
    positions: Positions
    windows: tuple[int | None, ...]
    query_factor: float = 1.0
    multipliers: Mapping[str, float] = field(default_factory=dict)

    @property
    def arrays(self) -> bool:
        """Whether the counts differ by layer and are written as arrays."""
        return len(set(self.counts)) > 1 or len(set(self.widths)) > 1


LLAMA = Gguf("llama", permuted=True, biases=ALL_BIASES, turns=("default", "linear", "llama3"))
DECI = replace(LLAMA, architecture="deci")
UNIFORM: Mapping[str, Gguf] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "seed_oss"), LLAMA),
    "qwen3": Gguf("qwen3"),
    "granite": Gguf("granite", permuted=True),
    "smollm3": Gguf("smollm3", permuted=True),
    "gemma3_text": Gguf("gemma3", norm_shift=1.0, windows=True, activation=GELU),
}
PER_LAYER: Mapping[str, Gguf] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "seed_oss", "granite"), DECI),
    # openelm has no output matrix of its own, and step35 takes one width for all MLPs.
    "qwen3": Gguf("openelm", fused=True),
    "gemma3_text": replace(UNIFORM["gemma3_text"], padded=True),
}
QWEN3_UNTIED = Gguf("step35")
INSTEAD = "Use --format onnx or hf"


def gguf_model(
    config: Config, g: Geometry, counts: Sequence[tuple[int, int]], widths: Sequence[int], dtypes: Collection[str] = ()
) -> GgufModel:
    """How llama.cpp holds a model with these (query, key/value) head counts and widths of the MLPs per layer.

    `dtypes`: those that its tensors are stored in. Raises UnsupportedModelError for what llama.cpp does not hold, and
    CheckpointError for settings with which the model's own class cannot run.
    """
    form = _form(g, counts, widths)
    _demand_parts(config, g, form, dtypes)
    positions = _positions(config, g, form)
    windows = windows_of(config, g.family, g.layers)
    if any(windows) and not form.windows:
        raise _refused(
            f"as {form.architecture} llama.cpp attends to all that comes before, and this model has sliding windows",
            "Use --format onnx or hf.",
        )
    factor, multipliers = _scales(config, g, form)
    return GgufModel(
        form,
        tuple((heads, kv_heads) for heads, kv_heads in counts),
        tuple(widths),
        positions,
        windows,
        factor,
        multipliers,
    )


def _refused(why: str, hint: str = f"{INSTEAD}.") -> UnsupportedModelError:
    return UnsupportedModelError(f"The GGUF export cannot write this model: {why}.", hint=hint)


def _form(g: Geometry, counts: Sequence[tuple[int, int]], widths: Sequence[int]) -> Gguf:
    uniform = len(set(counts)) == 1 and len(set(widths)) == 1
    kind = g.family.model_type
    if not all(heads for heads, _ in counts):
        raise _refused("layers without attention were not tried in llama.cpp", f"{INSTEAD}.")
    if g.family.experts is not None:
        raise _refused("mixtures of experts were not tried in llama.cpp", "Use --format hf.")
    if g.layers > MOST_LAYERS:
        raise _refused(f"llama.cpp holds {MOST_LAYERS} layers at most", "Use --format hf.")
    form = (UNIFORM if uniform else PER_LAYER).get(kind)
    if form is None:
        layout = "uniform" if uniform else "per-layer"
        also = "; a uniform one is held: build with --layout uniform" if not uniform and kind in UNIFORM else ""
        raise _refused(f"no GGUF of a {layout} {g.family.architecture} was tried", f"{INSTEAD}{also}.")
    if form.architecture != "openelm" or g.tied:
        return form
    if len(set(widths)) > 1:
        raise _refused(
            "llama.cpp holds a Qwen3 whose MLPs differ in width only where its embeddings are tied",
            "Build with --units heads or --layout uniform, or use --format onnx or hf.",
        )
    return QWEN3_UNTIED


def _demand_parts(config: Config, g: Geometry, form: Gguf, dtypes: Collection[str]) -> None:
    activation = config.get("hidden_activation" if form.activation == GELU else "hidden_act")
    silent = g.family.silent.get("hidden_act") or g.family.silent.get("hidden_activation")
    if (activation or silent) != form.activation:
        raise _refused(f"as {form.architecture} llama.cpp computes {form.activation}, not {activation!r:.60}")
    if config.get("is_causal", True) is not True:
        raise _refused(f"config.json has is_causal = {config['is_causal']!r:.60}", "Use --format hf.")
    if key := stray_window(config, g.family):
        raise _refused(
            f"config.json has {key}, which {g.family.architecture} does not know and transformers' cache follows",
            f"Set {key} to null if the model has no sliding windows.",
        )
    has = {QKV: g.qkv_bias, OUT: g.o_bias, MLP: g.mlp_bias}
    if missing := [part for part, present in has.items() if present and part not in form.biases]:
        raise _refused(f"biases of {missing[0]} were not tried in llama.cpp as {form.architecture}")
    for cap in ("final_logit_softcapping", "attn_logit_softcapping"):
        if g.family.caps_logits and config.get(cap) is not None:
            raise _refused(f"{cap} was not tried in llama.cpp")
    if others := sorted(set(dtypes) - set(FLOATS)):
        raise _refused(
            f"it is stored as {others[0]}, and {', '.join(FLOATS)} are read",
            "Save it in one of these with transformers first.",
        )


def _positions(config: Config, g: Geometry, form: Gguf) -> Positions:
    positions = rope_of(config, g.family)
    for parameters in filter(None, (positions.parameters, positions.local)):
        kind = str(parameters["rope_type"])
        if kind not in form.turns:
            raise _refused(f"{kind!r} positions were not tried in llama.cpp as {form.architecture}")
        if parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise _refused("rotary positions on a part of the head were not tried in llama.cpp")
    turned = turned_layers(config, g.family, g.layers)
    wanted = tuple((index + 1) % UNTURNED_EVERY != 0 for index in range(g.layers))
    if g.family.model_type == "smollm3" and turned != wanted:
        raise _refused(f"llama.cpp leaves every {UNTURNED_EVERY}th layer of a SmolLM3 without positions, and no other")
    return positions


def _scales(config: Config, g: Geometry, form: Gguf) -> tuple[float, Mapping[str, float]]:
    """(factor of q, multipliers that the file states). The architectures multiply scores by head_dim ** -0.5."""
    usual = g.head_dim**-0.5
    if g.family.model_type == "gemma3_text":
        if g.layers == GEMMA_27B_LAYERS:
            raise _refused(f"a Gemma 3 of {GEMMA_27B_LAYERS} layers was not tried in llama.cpp")
        return float(config.get("query_pre_attn_scalar", 256)) ** -0.5 / usual, {}
    if g.family.model_type != "granite":
        return 1.0, {}
    found = {name: float(config.get(key, 1.0)) for name, key in GRANITE.items()}
    if form.architecture == "granite":
        return 1.0, found
    odd = next((GRANITE[name] for name, value in found.items() if name != "attention" and value != 1.0), None)
    if odd is not None:
        raise _refused(
            f"llama.cpp holds a per-layer Granite only with {odd} = 1",
            "Build with --layout uniform, or use --format onnx or hf.",
        )
    factor = found["attention"] / usual
    return (1.0 if math.isclose(factor, 1.0, rel_tol=1e-7) else factor), {}
