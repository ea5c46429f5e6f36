"""The modules of a decoder layer that everything else looks at, by what they do rather than by what they are called.

`residual norm`: its positional input is the residual stream after attention is added and before the MLP; the family
table names it (`post_attention_layernorm` in most, not in all). `o_proj`: at its input the heads still stand side by
side; it is the only place where closing a head is a multiplication by zero. `down_proj`: the same for the channels of
the MLP; `experts` are in the place of it where a layer chooses between some.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from sspcompile.families import FAMILIES, Geometry
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.stored import double_device
from sspcompile.model.weights import weight_of


def o_proj(layer: nn.Module) -> nn.Linear:
    """The output projection of one decoder layer; its input is [batch, tokens, heads * head_dim]."""
    return cast(nn.Linear, layer.get_submodule("self_attn.o_proj"))


def attention(layer: nn.Module) -> nn.Module:
    """The whole attention of one decoder layer; it gives its output [batch, tokens, hidden] first of two."""
    return layer.get_submodule("self_attn")


def input_norm(layer: nn.Module) -> nn.Module:
    """The module whose positional input is the residual stream before attention, [batch, tokens, hidden]."""
    return layer.get_submodule("input_layernorm")


def projection_place(geometry: Geometry, name: str) -> tuple[str, slice]:
    """Where q_proj, k_proj, v_proj or o_proj stands: the module of the attention, and the rows of its weight."""
    if name == "o_proj" or not geometry.family.fused_qkv:
        return name, slice(None)
    q, kv = geometry.heads * geometry.head_dim, geometry.kv_heads * geometry.head_dim
    return "qkv_proj", {"q_proj": slice(0, q), "k_proj": slice(q, q + kv), "v_proj": slice(q + kv, None)}[name]


def projection_weight(loaded: LoadedModel, layer: int, name: str) -> Tensor:
    """The weight of q_proj, k_proj, v_proj or o_proj, [rows, columns], wherever it lies; not to be written to.

    It is on its layer's device, or on the CPU beside one without float64.
    """
    module, rows = projection_place(loaded.geometry, name)
    weight = weight_of(loaded.layers[layer].get_submodule(f"self_attn.{module}"))[rows]
    return weight.to(double_device(weight.device))


def residual_norm(layer: nn.Module) -> nn.Module:
    """The module whose positional input is the residual stream after attention, [batch, tokens, hidden]."""
    config: Any = layer.get_submodule("self_attn").config
    return layer.get_submodule(FAMILIES[config.model_type].residual_norm)


def down_proj(layer: nn.Module) -> nn.Linear:
    """The MLP's output projection; its input is [batch, tokens, intermediate]. The family table names it."""
    config: Any = layer.get_submodule("self_attn").config
    return cast(nn.Linear, layer.get_submodule(FAMILIES[config.model_type].down))


def experts(layer: nn.Module) -> nn.Module:
    """All experts of a sparse layer as one module, their matrices stacked; a router says which tokens each sees."""
    return layer.get_submodule("mlp.experts")


def layer_output(output: Tensor | tuple[Any, ...]) -> Tensor:
    """The hidden state that a decoder layer returns, bare or first of a tuple, by version of transformers."""
    return output[0] if isinstance(output, tuple) else output
