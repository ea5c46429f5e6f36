"""One family's weights in another family's class: which can hold them, and under what configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sspcompile.families.geometry import Geometry, geometry_of
from sspcompile.families.table import FAMILIES, Family


@dataclass(frozen=True)
class Host:
    """`family` loads the weights. `settings`: what its configuration must say to compute what the source computes.

    `zero_biases`: biases that its class has and the source has not ("qkv", "o"); they are written as zeros.
    """

    family: Family
    settings: Mapping[str, Any]
    zero_biases: tuple[str, ...] = ()


def hosting(geometry: Geometry, name: str) -> Host | None:
    """How the family called `name` holds this model losslessly, or None when it cannot."""
    source = geometry.family
    if name == source.model_type:
        return Host(source, {})
    if name not in source.hosts or geometry.windowed:
        return None
    host = FAMILIES[name]
    if geometry.named_tokenizer and host.tokenizer:
        return None
    wanted = {"qkv": geometry.qkv_bias, "o": geometry.o_bias, "mlp": geometry.mlp_bias}
    rules = {"qkv": host.qkv_bias, "o": host.o_bias, "mlp": host.mlp_bias}
    switches: dict[str, bool] = {}
    for part, rule in rules.items():
        if isinstance(rule, str):
            switches[rule] = switches.get(rule, False) or wanted[part]
    has = {part: switches[rule] if isinstance(rule, str) else rule for part, rule in rules.items()}
    zero = tuple(part for part in rules if has[part] and not wanted[part])
    if "mlp" in zero or any(wanted[part] and not has[part] for part in rules):
        return None
    return Host(host, {**host.neutral(geometry.head_dim), **switches}, zero)


def holds(geometry: Geometry, family: Family, heads: int) -> bool:
    """Whether the stock class of `family` accepts `heads` query heads in every layer."""
    if family.hidden_must_divide and geometry.hidden % heads:
        return False
    return not (geometry.fixed_heads and heads != geometry.heads)


def hosted_config(config: Mapping[str, Any], geometry: Geometry, host: Host) -> dict[str, Any]:
    """The configuration under which `host` computes what the model of `config` computes."""
    source = geometry.family
    if host.family is source:
        return dict(config)
    # What the source's class takes for granted the host's class may take for something else.
    found = {key: value for key, value in source.silent.items() if host.family.silent.get(key, value) != value}
    found |= {key: value for key, value in config.items() if key not in source.own_keys}
    found |= {"model_type": host.family.model_type, "architectures": [host.family.architecture]}
    found |= {"head_dim": geometry.head_dim, "num_key_value_heads": geometry.kv_heads}
    return found | {"tie_word_embeddings": geometry.tied} | dict(host.settings)


def stand_in(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The configuration that loads a dense model whose own class refuses its head count; None for every other model.

    transformers 5 rejects a Llama whose hidden_size is not a multiple of its heads, though it computes such a model;
    4.57 loads it. Raises what `geometry_of` raises.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None or not family.hidden_must_divide or config.get("per_layer_config"):
        return None
    g = geometry_of(config)
    if holds(g, g.family, g.heads):
        return None
    hosts = (hosting(g, name) for name in g.family.hosts)
    host = next(
        (one for one in hosts if one is not None and not one.zero_biases and holds(g, one.family, g.heads)), None
    )
    return None if host is None else hosted_config(config, g, host)
