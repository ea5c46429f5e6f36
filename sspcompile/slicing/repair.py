"""Repairs: what is left makes up for the heads that were removed. Shapes do not change.

*Least squares* refits the kept columns so that the pruned model's residual stream after attention comes as close as it
can to the dense model's. In each layer, with X [N, kept * D] the pruned model's own input of o_proj and R [N, d] its
residual stream before attention, the kept columns W of o_proj solve

    min_W sum_n w_n |x_n W^T + r_n + b - y_n|^2 + ridge * trace(X^T diag(w) X) / (kept * D) * |W - W0|^2

where Y [N, d] is the dense residual stream after attention, b the bias and W0 the columns as they were (with a residual
multiplier, Y - R is divided by it). The weights w
give the positions where the model decodes SCORED_SHARE of the total: they are what the pruned model will be asked for,
and a few of them stand against a whole prompt. Layers are solved in order, so each sees the errors that the ones before
it could not mend.

*Least squares with the MLP* goes on in each layer with down_proj: its inputs are the pruned model's, its target is what
is missing of the dense residual stream after the whole layer. It mends more where much was cut, at the price of
rewriting weights that are not of attention; its ridge is stronger, because down_proj has more inputs than a few prompts
excite.

*FLAP's bias* (An et al. 2024, arXiv 2312.11983, section 3.3) leaves the weights alone and adds what the removed heads
put out on average, b + W_removed mean(x_removed), the mean taken over the dense model's inputs of o_proj. It needs an
o_proj with a bias; families.py says which architectures have one (`o_bias`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from sspcompile.checkpoint.source import WORD_DTYPE
from sspcompile.errors import UnsupportedModelError
from sspcompile.families import Geometry, layer_prefix
from sspcompile.loaded import LoadedModel, layer_output, o_proj, recorded_calls, residual_norm
from sspcompile.prepare.text import Batch

# With 4 to 8 prompts a refit made things worse in earlier measurements, with 16 it helped.
MIN_PROMPTS = 16
# Relative to the mean energy of an input coordinate: small enough to fit, large enough to leave directions that the
# prompts never excite as they were.
RIDGE = 1e-2
MLP_RIDGE = 1e-1
# Of the weight of all positions. On the embedded model, unweighted positions (about a tenth) leave up to 15 points of
# exact match behind, and a share near 1 forgets how the prompt is read.
SCORED_SHARE = 0.5


DOWN = "mlp.down_proj.weight"


@dataclass(frozen=True)
class Repair:
    """What a repair puts into a layer; one that is missing is left as it was.

    `weights`: o_proj, [hidden, heads * D] per layer in the dense shape, zero in removed columns. `biases`: of o_proj,
    [hidden] per layer, instead of the bias that was there or of none. `down`: down_proj, [hidden, intermediate] per
    layer. The dtype is the checkpoint's own, so that what is measured is what is written.
    """

    weights: Mapping[int, Tensor]
    biases: Mapping[int, Tensor] = field(default_factory=dict)
    down: Mapping[int, Tensor] = field(default_factory=dict)

    def words(self, layer: int, kept: Sequence[int], head_dim: int) -> np.ndarray:
        """The kept columns of a layer as raw words, [hidden, kept * D], ready to be written."""
        columns = torch.cat([torch.arange(head * head_dim, (head + 1) * head_dim) for head in kept])
        return _words(self.weights[layer][:, columns])

    def replaced(self, kept: Sequence[Sequence[int]], head_dim: int) -> dict[str, np.ndarray]:
        """Tensor name -> words, for `cut_tensors`."""
        weights = {
            layer_prefix(layer) + "self_attn.o_proj.weight": self.words(layer, kept[layer], head_dim)
            for layer in self.weights
        }
        biases = {layer_prefix(layer) + "self_attn.o_proj.bias": _words(bias) for layer, bias in self.biases.items()}
        return weights | biases | {layer_prefix(layer) + DOWN: _words(weight) for layer, weight in self.down.items()}


def _words(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy().view(WORD_DTYPE[tensor.element_size()])


def is_linear(geometry: Geometry) -> bool:
    """Whether what o_proj puts out joins the residual stream as it is, up to a factor: only then can it be refitted."""
    return not geometry.family.normed_attention


def demand_place(geometry: Geometry, repair: str) -> None:
    """Raise UnsupportedModelError unless the architecture has the tensor that a repair writes into."""
    family = geometry.family
    plain = family.experts is None and is_linear(geometry) and any(part.name == "mlp.down_proj" for part in family.mlp)
    if repair == "least-squares-mlp" and not plain:
        raise UnsupportedModelError(
            f"{family.architecture} has no down_proj that --repair least-squares-mlp could refit.",
            hint="Use --repair least-squares, or --repair none.",
        )
    if repair == "flap-bias" and not geometry.o_bias:
        raise UnsupportedModelError(
            f"The o_proj of this {geometry.family.architecture} has no bias, so --repair flap-bias cannot be written.",
            hint="Use --repair least-squares, or --repair none.",
        )


@contextlib.contextmanager
def repaired(loaded: LoadedModel, repair: Repair | None) -> Iterator[None]:
    """Run the model with a repair in place; together with `head_gates` this is the oracle of a repaired cut.

    A bias may be put where the architecture has none: such a model can be judged, but not written.
    """
    originals: dict[int, tuple[Tensor, nn.Parameter | None]] = {}
    down: dict[int, Tensor] = {}
    try:
        for layer, weight in (repair.down if repair is not None else {}).items():
            projection = down_proj(loaded.layers[layer])
            down[layer] = projection.weight.data
            projection.weight.data = weight.to(projection.weight)
        for layer in sorted({*repair.weights, *repair.biases} if repair is not None else ()):
            projection = o_proj(loaded.layers[layer])
            originals[layer] = projection.weight.data, projection.bias
            if layer in repair.weights:
                projection.weight.data = repair.weights[layer].to(projection.weight)
            if layer in repair.biases:
                bias = repair.biases[layer].to(projection.weight)
                projection.bias = nn.Parameter(bias, requires_grad=False)
        yield
    finally:
        for layer, (weight, bias) in originals.items():
            projection = o_proj(loaded.layers[layer])
            projection.weight.data, projection.bias = weight, bias
        for layer, weight in down.items():
            down_proj(loaded.layers[layer]).weight.data = weight


@torch.inference_mode()
def fit_repair(
    loaded: LoadedModel,
    kept: np.ndarray,
    batches: Sequence[Batch],
    *,
    dtype: torch.dtype,
    ridge: float = RIDGE,
    mlp: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Repair:
    """Refit o_proj, and with `mlp` down_proj too, for a mask `kept` (bool [layers, heads]) on the texts of `batches`.

    Two hidden states per batch are held (dense and pruned, [B, T, d]); each layer is run once dense and twice pruned,
    once more with `mlp`. `dtype` is the dtype the weights will be written in.
    """
    g = loaded.geometry
    calls, dense = [], []
    for batch in batches:
        with recorded_calls(loaded) as recorded:
            loaded.model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        # Only the first layer's hidden state is kept: all of them would be a whole forward pass in memory per batch.
        dense.append(recorded[0].hidden)
        calls.append([(recorded[index].rest, recorded[index].options) for index in range(g.layers)])
    pruned, position_weights = list(dense), _position_weights(batches)
    weights: dict[int, Tensor] = {}
    down: dict[int, Tensor] = {}
    for index, layer in enumerate(loaded.layers):
        columns = torch.from_numpy(np.repeat(kept[index], g.head_dim)).to(loaded.device)
        system = _Normal(int(columns.sum()), g.hidden, loaded.device)
        cut = bool(weights) or not columns.all()
        for number, batch in enumerate(batches):
            rest, options = calls[number][index]
            real = batch.attention_mask.bool()
            with _reading(residual_norm(layer)) as after:
                output = layer_output(layer(dense[number], *rest, **options))
            if cut:
                with _reading(o_proj(layer)) as entering:
                    layer(pruned[number], *rest, **options)
                missing = (after[0] - pruned[number]) / g.residual_multiplier
                if o_proj(layer).bias is not None:
                    missing = missing - o_proj(layer).bias
                system.add(entering[0][real][:, columns], missing[real], position_weights[number][real])
            dense[number] = output
        if cut:
            weights[index] = _refit(o_proj(layer).weight, columns, system, ridge, dtype)
        mended = Repair({index: weights[index]} if cut else {})
        if cut and mlp:
            with repaired(loaded, mended):
                down[index] = _refit_down(
                    layer, pruned, dense, [one[index] for one in calls], batches, position_weights, dtype,
                    g.residual_multiplier,
                )
            mended = Repair(mended.weights, down={index: down[index]})
        with repaired(loaded, mended):
            for number in range(len(batches)):
                rest, options = calls[number][index]
                pruned[number] = layer_output(layer(pruned[number], *rest, **options))
        if progress is not None:
            progress(index + 1, g.layers)
    return Repair(weights, down=down)


def down_proj(layer: nn.Module) -> nn.Linear:
    """The MLP's output projection; its input is [batch, tokens, intermediate]."""
    return layer.mlp.down_proj


def _refit_down(
    layer: nn.Module, pruned: Sequence[Tensor], dense: Sequence[Tensor],
    calls: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]], batches: Sequence[Batch],
    position_weights: Sequence[Tensor], dtype: torch.dtype, multiplier: float,
) -> Tensor:
    """down_proj [hidden, intermediate] of a layer whose o_proj is repaired: `pruned` are its inputs, `dense` the dense
    layer's outputs, [B, T, d] per batch."""
    projection = down_proj(layer)
    system = _Normal(projection.in_features, projection.out_features, projection.weight.device)
    for number, batch in enumerate(batches):
        rest, options = calls[number]
        real = batch.attention_mask.bool()
        with _reading(projection) as entering, _reading(residual_norm(layer)) as after:
            layer(pruned[number], *rest, **options)
        missing = (dense[number] - after[0]) / multiplier
        if projection.bias is not None:
            missing = missing - projection.bias
        system.add(entering[0][real], missing[real], position_weights[number][real])
    return system.solve(projection.weight.double().T, MLP_RIDGE).T.to(dtype).contiguous()


def _position_weights(batches: Sequence[Batch]) -> list[Tensor]:
    """Weight of every position, [B, T] per batch: scored ones and other real ones share as SCORED_SHARE says."""
    scored = sum(int(batch.score_mask.sum()) for batch in batches)
    other = sum(int(batch.attention_mask.sum()) for batch in batches) - scored
    ratio = SCORED_SHARE / (1 - SCORED_SHARE) * other / scored if other else 1.0
    return [torch.where(batch.score_mask, ratio, 1.0) for batch in batches]


@torch.inference_mode()
def fit_bias(
    loaded: LoadedModel,
    kept: np.ndarray,
    batches: Sequence[Batch],
    *,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
) -> Repair:
    """FLAP's bias for a mask `kept` (bool [layers, heads]), from one dense forward pass over the texts of `batches`.

    Works for every model in memory; only those whose o_proj has a bias can be written with it (`demand_bias`).
    """
    g = loaded.geometry
    total = torch.zeros(g.layers, g.heads * g.head_dim, dtype=torch.float64, device=loaded.device)
    tokens = 0
    for number, batch in enumerate(batches):
        real = batch.attention_mask.bool()
        tokens += int(real.sum())
        with contextlib.ExitStack() as stack:
            entering = [stack.enter_context(_reading(o_proj(layer))) for layer in loaded.layers]
            loaded.model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        for index, seen in enumerate(entering):
            total[index] += seen[0][real].double().sum(0)
        if progress is not None:
            progress(number + 1, len(batches))
    biases: dict[int, Tensor] = {}
    for index, layer in enumerate(loaded.layers):
        removed = torch.from_numpy(np.repeat(~kept[index], g.head_dim)).to(loaded.device)
        if removed.any():
            projection = o_proj(layer)
            added = projection.weight[:, removed].double() @ (total[index, removed] / tokens)
            before = 0.0 if projection.bias is None else projection.bias.double()
            biases[index] = (before + added).to(dtype)
    return Repair({}, biases)


def written_down(folder: Path, geometry: Geometry) -> dict[int, Tensor]:
    """The down_proj weights [hidden, intermediate] of a finished cut, by layer, in fp32."""
    return _written(folder, {layer_prefix(layer) + DOWN: layer for layer in range(geometry.layers)})


def written_biases(folder: Path, geometry: Geometry) -> dict[int, Tensor]:
    """The o_proj biases [hidden] of a finished cut, by layer, in fp32; none where the architecture has none."""
    if not geometry.o_bias:
        return {}
    return _written(folder, {layer_prefix(n) + "self_attn.o_proj.bias": n for n in range(geometry.layers)})


def _written(folder: Path, names: Mapping[str, int]) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {names[name]: opened.get_tensor(name).float() for name in names.keys() & set(opened.keys())}
    return found


class _Normal:
    """Normal equations in float64: X^T diag(w) X and X^T diag(w) Y, summed over batches."""

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        self.xx = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.xy = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)

    def add(self, x: Tensor, y: Tensor, weights: Tensor) -> None:
        """Rows x [N, inputs] and y [N, outputs], with a weight [N] each."""
        x, weighted = x.double(), x.double() * weights.double().unsqueeze(1)
        self.xx += weighted.T @ x
        self.xy += weighted.T @ y.double()

    def solve(self, start: Tensor, ridge: float) -> Tensor:
        """W^T [inputs, outputs] that minimises the ridge problem around `start`, of the same shape."""
        size = len(self.xx)
        strength = ridge * self.xx.diagonal().mean()
        if not strength > 0:
            return start
        system = self.xx + strength * torch.eye(size, dtype=torch.float64, device=self.xx.device)
        return torch.linalg.solve(system, self.xy + strength * start)


def _refit(weight: Tensor, columns: Tensor, system: _Normal, ridge: float, dtype: torch.dtype) -> Tensor:
    """[hidden, heads * D] with refitted kept columns and zeros elsewhere: a removed head contributes nothing."""
    solved = system.solve(weight[:, columns].double().T, ridge).T
    full = torch.zeros_like(weight, dtype=dtype)
    full[:, columns] = solved.to(dtype)
    return full


@contextlib.contextmanager
def _reading(module: nn.Module) -> Iterator[list[Tensor]]:
    """The positional input of a module's only call."""
    seen: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()
