"""Repairs: what is left makes up for the units that were removed. Shapes do not change.

*Least squares* refits the kept columns so that the pruned model's residual stream after attention comes as close as it
can to the dense model's. In each layer, with X [N, kept * D] the pruned model's own input of o_proj and R [N, d] its
residual stream before attention, the kept columns W of o_proj solve

    min_W sum_n w_n |x_n W^T + r_n + b - y_n|^2 + ridge * sum_c (X^T diag(w) X)_cc |W_c - W0_c|^2

where Y [N, d] is the dense residual stream after attention, b the bias and W0 the columns as they were (with a residual
multiplier, Y - R is divided by it). The weights w give the positions where the model decodes half of the total
(dense.py): they are what the pruned model will be asked for, and a few of them stand against a whole prompt. Layers
are solved in order, so each sees the errors that the ones before it could not mend.

Where channels of an MLP were removed, the kept columns of its down_proj are refitted in the same way: its inputs are
the pruned model's, its target is what is missing of the dense residual stream after the whole layer. In front of layers
that were removed whole it is refitted too, and aims at the dense residual stream behind them. So it is in a layer whose
attention was removed: the MLP has to make up for it.

Where channels of experts were removed, the kept columns of each expert's down projection are refitted, one expert after
another. Token n visits the experts E(n), whose outputs count by the shares s_ne; S_n is their sum. With x_ne the
channels of expert e, run on the pruned model's own state, W0_e all columns of its down projection as they were, and t_n
what the layer has to add to the residual stream to get to the dense one behind it,

    y_ne = W0_e x_ne + (t_n - sum_e s_ne W0_e x_ne) / S_n
    min_W sum_n w_n s_ne S_n |x_ne,kept W^T - y_ne|^2 + ridge * sum_c m_c |W_c - W0_c|^2

with m_c the energy of a channel in that sum. The y_ne times their shares sum up to t_n, so by Cauchy and Schwarz the
layer's own error, sum_n w_n |t_n - sum_e s_ne W_e x_ne,kept|^2, is at most the sum over experts of what is minimised
(one step of majorisation: Hunter and Lange, A tutorial on MM algorithms, 2004). Where fewer tokens visit an expert than
it keeps channels, the ridge is firmer by that ratio. An expert that none visits is left as it was.

*Least squares with the MLP* refits down_proj in every layer, whether it lost channels or not. It mends more where many
heads were cut, at the price of rewriting weights that nothing was removed from.

*FLAP's bias* (An et al. 2024, arXiv 2312.11983, section 3.3) leaves the weights alone and adds what the removed heads
put out on average, b + W_removed mean(x_removed), the mean taken over the dense model's inputs of o_proj. It needs an
o_proj with a bias; families says which architectures have one (`o_bias`). What removed channels put out on average goes
into the bias of down_proj in the same way, where there is one (`mlp_bias`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from sspcompile.checkpoint.headers import WORD_DTYPE
from sspcompile.checkpoint.source import Checkpoint
from sspcompile.checkpoint.tensors import down_names
from sspcompile.errors import UnsupportedModelError
from sspcompile.families import Geometry, layer_prefix
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.experts import DOWN, down_of
from sspcompile.model.hooks import channel_gates, head_gates, without
from sspcompile.model.modules import down_proj, experts, o_proj
from sspcompile.model.stored import stored_dtype
from sspcompile.model.weights import replaced
from sspcompile.slicing.mask import Kept

# With 4 to 8 prompts a refit made things worse in earlier measurements, with 16 it helped.
MIN_PROMPTS = 16


@dataclass(frozen=True)
class Repair:
    """What a repair puts into a layer; one that is missing is left as it was.

    `weights`: o_proj, [hidden, heads * D] per layer in the dense shape, zero in removed columns. `biases`: of o_proj,
    [hidden] per layer, instead of the bias that was there or of none. `down`: down_proj, [hidden, intermediate] per
    layer, zero in removed columns; `down_biases`: of down_proj, like `biases`. `experts`: per layer, by the numbers of
    its experts, their down projections, each [hidden, width] like `down`. The dtype is the checkpoint's own, so that
    what is measured is what is written.
    """

    weights: Mapping[int, Tensor]
    biases: Mapping[int, Tensor] = field(default_factory=dict)
    down: Mapping[int, Tensor] = field(default_factory=dict)
    down_biases: Mapping[int, Tensor] = field(default_factory=dict)
    experts: Mapping[int, Mapping[int, Tensor]] = field(default_factory=dict)

    def replaced(self, kept: Kept, g: Geometry) -> dict[str, np.ndarray]:
        """Tensor name in the dense model -> the kept columns as raw words, for `cut_tensors`."""
        found = {}
        for layer, weight in self.weights.items():
            columns = torch.from_numpy(np.repeat(kept.heads[layer], g.head_dim))
            found[layer_prefix(layer) + "self_attn.o_proj.weight"] = _words(weight[:, columns])
        for layer, bias in self.biases.items():
            found[layer_prefix(layer) + "self_attn.o_proj.bias"] = _words(bias)
        for layer, weight in self.down.items():
            channels = None if kept.channels is None else torch.from_numpy(kept.channels[layer])
            found[down_name(g, layer)] = _words(weight if channels is None else weight[:, channels])
        for layer, own in self.experts.items():
            names = down_names(g, layer)
            for number, weight in own.items():
                found[names[number]] = _words(weight[:, torch.from_numpy(channels_of(kept, g, layer)[number])])
        for layer, bias in self.down_biases.items():
            found[bias_name(g, layer)] = _words(bias)
        return found


def channels_of(kept: Kept, g: Geometry, layer: int) -> np.ndarray:
    """Which channels of a layer's MLPs stay, bool [mlps, width]."""
    rows = np.ones(g.channels, dtype=bool) if kept.channels is None else kept.channels[layer]
    return rows.reshape(g.mlps, g.width)


def down_name(g: Geometry, layer: int) -> str:
    """The name of a layer's down_proj among the tensors."""
    return f"{layer_prefix(layer)}{g.family.down}.weight"


def bias_name(g: Geometry, layer: int) -> str:
    """The name of a layer's down_proj bias among the tensors."""
    return f"{layer_prefix(layer)}{g.family.down}.bias"


def _words(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy().view(WORD_DTYPE[tensor.element_size()])


def refitted_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """In which refitted weights are written: the one that they are stored in."""
    return stored_dtype(checkpoint.tensors[layer_prefix(0) + "self_attn.o_proj.weight"].dtype)


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
    """Run the model with a repair in place; together with closed gates this is `masked`.

    A bias may be put where the architecture has none: such a model can be judged, but not written. Gates on experts
    have to be there already: they take the place of what runs experts.
    """
    with contextlib.ExitStack() as stack:
        for layer, tensors in _parameters(repair).items():
            for module, own in ((o_proj, tensors[0]), (down_proj, tensors[1])):
                if own:
                    stack.enter_context(replaced(module(loaded.layers[layer]), own))
        for layer, refitted in repair.experts.items() if repair is not None else ():
            together = experts(loaded.layers[layer])
            stack.enter_context(replaced(together, {DOWN: _stacked(together, refitted)}))
        yield


def _stacked(module: nn.Module, refitted: Mapping[int, Tensor]) -> Tensor:
    """The down projections of all experts of a layer, [experts, hidden, width], with the `refitted` ones."""
    every = down_of(module).clone()
    for number, weight in refitted.items():
        every[number] = weight.to(every)
    return every


@contextlib.contextmanager
def masked(loaded: LoadedModel, kept: Kept, repair: Repair | None = None) -> Iterator[None]:
    """Run the masked model: removed heads zeroed at the input of o_proj, removed channels at that of down_proj, removed
    layers passed by, with a repair in place. Of a layer that keeps no head o_proj has no bias either: its attention
    adds nothing. It is the oracle that everything written is compared with.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(without([loaded.layers[layer] for layer in kept.removed]))
        stack.enter_context(head_gates(loaded, _gates(kept.heads, loaded)))
        if kept.channels is not None:
            stack.enter_context(channel_gates(loaded, _gates(kept.channels, loaded)))
        if loaded.geometry.o_bias:
            nothing = {"bias": torch.zeros(loaded.geometry.hidden)}
            for layer in kept.silent:
                stack.enter_context(replaced(o_proj(loaded.layers[layer]), nothing))
        stack.enter_context(repaired(loaded, repair))
        yield


def _gates(kept: np.ndarray, loaded: LoadedModel) -> Tensor:
    return torch.from_numpy(kept).float().to(loaded.device)


def _parameters(repair: Repair | None) -> dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Layer -> what o_proj gets, and what down_proj gets."""
    if repair is None:
        return {}
    found: dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
    of_attention = ((0, "weight", repair.weights), (0, "bias", repair.biases))
    for place, name, tensors in (*of_attention, (1, "weight", repair.down), (1, "bias", repair.down_biases)):
        for layer, tensor in tensors.items():
            found.setdefault(layer, ({}, {}))[place][name] = tensor
    return found
