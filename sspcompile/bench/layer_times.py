"""Decoder layers of other shapes, timed: stock models of transformers with random weights and few layers.

Each model has the family, the hidden size and the settings of the one that is to be cut, and layers of one kind with
fewer key/value groups, fewer query heads in each, or a narrower MLP. Two numbers of layers tell a layer from what every
step takes besides, two vocabularies what the head takes. There are so many layers that no processor holds the weights
of the smallest in its caches, or as many as the model has.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from sspcompile.bench.step_times import step_rounds
from sspcompile.checkpoint.source import Checkpoint
from sspcompile.checkpoint.tensors import attention_shapes, mlp_shapes
from sspcompile.errors import InputError
from sspcompile.families import Geometry, geometry_of, holds, stand_in, without_layers
from sspcompile.families.windows import windows_of
from sspcompile.model.opening import computing_in, readable
from sspcompile.model.placement import Place
from sspcompile.model.streaming import compute_buffers
from sspcompile.progress import Progress, silent
from sspcompile.slicing.latency import Conditions, LatencyTable, Timed, table_of
from sspcompile.slicing.measures import Serving, tokens_held
from sspcompile.slicing.sizes import widths_of

# More than the last level of caches holds of any usual processor.
BEYOND_CACHES = 512 << 20
# A head over so few tokens takes no time.
FEW_TOKENS = 64
LEAST_LAYERS = 2
# Random numbers, written one behind the other into every matrix.
NUMBERS = 1 << 20
STAGE = "timing layers of other shapes"


@dataclass(frozen=True)
class Kind:
    """Layers that are alike but for their weights: the number of the `first`, which stands for all, their `count`, and
    how many tokens of a sequence their cache holds (`held`).
    """

    first: int
    count: int
    held: int


def kinds_of(config: Mapping[str, Any], g: Geometry, serving: Serving) -> tuple[tuple[int, ...], tuple[Kind, ...]]:
    """The kind of every layer by number, and the kinds: by what a layer caches, and whether it has experts.

    Raises CheckpointError like `windows_of`.
    """
    held = tokens_held(windows_of(config, g.family, g.layers), serving)
    alike = [(tokens, layer in g.sparse) for layer, tokens in enumerate(held)]
    every = [*dict.fromkeys(alike)]
    kinds = tuple(Kind(alike.index(one), alike.count(one), one[0]) for one in every)
    return tuple(map(every.index, alike)), kinds


def timed_shapes(g: Geometry) -> list[tuple[int, int, int]]:
    """(groups, query heads of each, width of the MLP): the whole layer first, then about half and a quarter of the
    groups, half of the heads in each, three quarters and half of the channels, and half of both.

    No shape that the family's class refuses is among them.
    """
    plain = replace(g, fixed_heads=False)  # positions are left unscaled
    groups = [n for n in range(1, g.kv_heads) if holds(plain, g.family, n * g.group_size)]
    each = [n for n in range(1, g.group_size) if holds(plain, g.family, g.kv_heads * n)]
    widths = [width for width in widths_of(g) if width < g.width] if g.has_channels else []
    whole = (g.kv_heads, g.group_size, g.width)
    half, half_each, half_width = (
        _nearest(groups, 0.5 * whole[0]),
        _nearest(each, 0.5 * whole[1]),
        _nearest(widths, 0.5 * whole[2]),
    )
    found = [whole]
    found += [(n, *whole[1:]) for n in (*half, *_nearest(groups, 0.25 * whole[0]))]
    found += [(whole[0], n, whole[2]) for n in half_each]
    found += [(*whole[:2], n) for n in (*_nearest(widths, 0.75 * whole[2]), *half_width)]
    found += [(n, whole[1], width) for n in half for width in half_width]
    return [*dict.fromkeys(found)]


def _nearest(values: Sequence[int], wanted: float) -> list[int]:
    """The one of `values` that is nearest, if there is one."""
    return sorted(values, key=lambda value: abs(value - wanted))[:1]


def timed_models(g: Geometry, depths: Sequence[int]) -> list[Timed]:
    """What is timed, without times: the largest model first, then every shape of every kind with its `depths` of
    layers, and the whole layer with half of them.
    """
    whole, *_ = shapes = timed_shapes(g)
    found = [Timed(0, depths[0], *whole, vocabulary=True, rounds=())]
    for kind, depth in enumerate(depths):
        found += [Timed(kind, depth, *shape, vocabulary=False, rounds=()) for shape in shapes]
        found.append(Timed(kind, depth // 2, *whole, vocabulary=False, rounds=()))
    return found


def layer_table(
    checkpoint: Checkpoint, conditions: Conditions, place: Place, progress: Progress = silent
) -> LatencyTable:
    """Time layers of other shapes on `place`, in turns, and fit the table. Needs a configuration and no weights.

    Raises InputError where two layers do not fit into memory, and CheckpointError for a configuration that
    transformers cannot make sense of.
    """
    config = stand_in(checkpoint.config) or checkpoint.config
    g, serving = geometry_of(config), conditions.serving
    by_layer, kinds = kinds_of(config, g, serving)
    rows = timed_models(g, depths_of(g, kinds, serving, place))
    pools = [Pool(place.device) for _ in kinds]
    with readable(checkpoint.path):
        models = [model_of(config, g, row, kinds[row.kind], place, pools[row.kind]) for row in rows]
        rounds = step_rounds(models, serving, place.device, progress, STAGE)
    timed = [replace(row, rounds=seconds) for row, seconds in zip(rows, rounds, strict=True)]
    return table_of(conditions, by_layer, timed)


def depths_of(g: Geometry, kinds: Sequence[Kind], serving: Serving, place: Place) -> list[int]:
    """How many layers of each kind are timed. Raises InputError where LEAST_LAYERS of each do not fit into memory."""
    width, shapes = place.dtype.itemsize, timed_shapes(g)
    smallest = [min(_numbers(g, kind, shape) for shape in shapes) * width for kind in kinds]
    wanted = [
        min(max(LEAST_LAYERS, kind.count), max(LEAST_LAYERS, math.ceil(BEYOND_CACHES / least)))
        for kind, least in zip(kinds, smallest, strict=True)
    ]

    def needed(depths: Sequence[int]) -> int:
        # Half a cache comes on top: each layer's is copied when a token joins it.
        cached = [3 * g.kv_heads * g.head_dim * kind.held * serving.batch for kind in kinds]
        weights = [_numbers(g, kind, shapes[0]) for kind in kinds]
        numbers = sum(depth * one for depth, one in zip(depths, weights, strict=True))
        numbers += max(depth * one for depth, one in zip(depths, cached, strict=True))
        return width * (numbers + (1 if g.tied else 2) * g.vocab * g.hidden)

    for depths in (wanted, [LEAST_LAYERS] * len(kinds)):
        if needed(depths) <= place.memory:
            return depths
    gigabytes = math.ceil(needed([LEAST_LAYERS] * len(kinds)) / 1e8) / 10
    raise InputError(
        f"--max-latency times {LEAST_LAYERS} layers of each kind, which with their cache take {gigabytes:g} GB.",
        hint="Give a larger --memory, a narrower --dtype, or a smaller --context or --batch.",
    )


def _numbers(g: Geometry, kind: Kind, shape: tuple[int, int, int]) -> int:
    """Parameters of a layer's matrices."""
    groups, each, width = shape
    tensors = attention_shapes(g, kind.first, groups * each, groups) | mlp_shapes(g, kind.first, width)
    return sum(math.prod(one) for one in tensors.values())


def model_of(config: Mapping[str, Any], g: Geometry, row: Timed, kind: Kind, place: Place, pool: Pool) -> Any:
    """A stock model as a row says, with random weights. Raises what transformers raises."""
    from transformers import AutoConfig, AutoModelForCausalLM

    # Configuration classes write into the mappings that they are given.
    found = copy.deepcopy(without_layers(config, g, [kind.first] * row.layers))
    left_out = {"model_type", "architectures", "auto_map", "dtype", "torch_dtype", "quantization_config"}
    # Long positions go by the number of heads in some classes; what they are takes no time.
    left_out |= {"rope_scaling", "rope_parameters"} if g.fixed_heads else set()
    settings = {key: value for key, value in found.items() if key not in left_out} | {
        "num_attention_heads": row.groups * row.each,
        "num_key_value_heads": row.groups,
        "head_dim": g.head_dim,
        **({g.family.width: row.width} if g.has_channels else {}),
        "tie_word_embeddings": g.tied,
        "vocab_size": g.vocab if row.vocabulary else FEW_TOKENS,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
    }
    with torch.device("meta"):
        stock = AutoConfig.for_model(str(found["model_type"]), **settings)
        model: Any = AutoModelForCausalLM.from_config(stock, **computing_in(place.dtype)).eval()
    compute_buffers(model, place.device)
    pool.fill(model)
    return model


class Pool:
    """Random weights that models share: a smaller tensor is the beginning of the one of its name in the largest model,
    which comes first.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._random = torch.randn(NUMBERS, generator=torch.Generator().manual_seed(0)) / 50
        self._held: dict[str, torch.Tensor] = {}

    def fill(self, model: nn.Module) -> None:
        """Give every parameter of a model on `meta` its numbers; tied ones stay one."""
        done: dict[nn.Parameter, nn.Parameter] = {}
        for place, module in model.named_modules():
            for name, parameter in [*module.named_parameters(recurse=False)]:
                if parameter not in done:
                    numbers = self._numbers(f"{place}.{name}", parameter)
                    done[parameter] = nn.Parameter(numbers, requires_grad=False)
                setattr(module, name, done[parameter])

    def _numbers(self, name: str, like: nn.Parameter) -> torch.Tensor:
        count = like.numel()
        if name not in self._held:
            one = torch.ones(1) if like.dim() == 1 else self._random  # norms, and biases
            whole = one.to(like.dtype).repeat(-(-count // len(one)))[:count]
            self._held[name] = whole.to(self._device)
        return self._held[name][:count].view(like.shape)
