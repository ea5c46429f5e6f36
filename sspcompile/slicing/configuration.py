"""config.json of the smaller model, readable by transformers 4.57 and 5 alike."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from sspcompile.families import FAMILIES
from sspcompile.slicing.plan import SlicePlan

MODELING_FILE = "modeling_sspcompile.py"
CUSTOM_CLASSES: Mapping[str, str] = {
    "mistral": "PerLayerMistralForCausalLM",
    "qwen2": "PerLayerQwen2ForCausalLM",
    "qwen3": "PerLayerQwen3ForCausalLM",
}
# Keys of LlamaConfig that MistralConfig does not have; all are switched off when Mistral is the host.
LLAMA_ONLY = ("attention_bias", "mlp_bias", "pretraining_tp")


def sliced_config(source: Mapping[str, Any], plan: SlicePlan) -> dict[str, Any]:
    """The configuration of the cut. An uncut model keeps its own."""
    config = copy.deepcopy(dict(source))
    if plan.keeps_everything:
        return config
    config["head_dim"] = plan.geometry.head_dim
    config["num_attention_heads"] = max(heads for heads, _ in plan.counts)
    config["num_key_value_heads"] = max(groups for _, groups in plan.counts)
    config["architectures"] = [plan.host.architecture]
    _both_rope_spellings(config)
    if plan.host is not FAMILIES[plan.geometry.family.model_type]:
        config["model_type"] = plan.host.model_type
        config["sliding_window"] = None
        for key in LLAMA_ONLY:
            config.pop(key, None)
    if plan.custom_code:
        name = CUSTOM_CLASSES[plan.host.model_type]
        config["architectures"] = [name]
        config["auto_map"] = {"AutoModelForCausalLM": f"{MODELING_FILE.removesuffix('.py')}.{name}"}
        config["per_layer_config"] = {
            str(layer): {"num_attention_heads": heads, "num_key_value_heads": groups}
            for layer, (heads, groups) in enumerate(plan.counts)
        }
    return config


def _both_rope_spellings(config: dict[str, Any]) -> None:
    """transformers 5 writes `rope_parameters`; 4.57 does not read it and would silently fall back to theta 10000."""
    parameters = config.get("rope_parameters")
    if isinstance(parameters, Mapping):
        scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
        if "rope_theta" in parameters:
            config["rope_theta"] = parameters["rope_theta"]
        scaled = scaling.get("rope_type", "default") != "default"
        config["rope_scaling"] = scaling if scaled else None
    else:
        scaling = config.get("rope_scaling") or {"rope_type": "default"}
        config["rope_parameters"] = {"rope_theta": config.get("rope_theta", 10000.0), **scaling}
        if "type" in scaling and "rope_type" not in scaling:
            config["rope_parameters"]["rope_type"] = scaling["type"]
