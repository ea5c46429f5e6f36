"""config.json of the smaller model, readable by transformers 4.57 and 5 alike."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sspcompile.errors import ArtifactError
from sspcompile.slicing.plan import SlicePlan

MODELING_FILE = "modeling_sspcompile.py"
CLASS_PREFIX = "PerLayer"
# What 4.57 calls the base frequency of Gemma 3's sliding layers.
LOCAL_THETA = "rope_local_base_freq"
# transformers 4.57 has Phi-3 check that rope_scaling holds these and no other keys.
PHI3_SCALING = ("type", "short_factor", "long_factor")


def sliced_config(source: Mapping[str, Any], plan: SlicePlan) -> dict[str, Any]:
    """The configuration of the cut. An uncut model keeps its own."""
    config = copy.deepcopy(dict(source))
    if plan.keeps_everything:
        return config
    g = plan.geometry
    config["head_dim"] = g.head_dim
    config["num_attention_heads"] = max(heads for heads, _ in plan.counts)
    config["num_key_value_heads"] = max(groups for _, groups in plan.counts)
    config["architectures"] = [plan.host.architecture]
    # Silent defaults differ between families and versions.
    config["tie_word_embeddings"] = g.tied
    _both_rope_spellings(config)
    if "num_local_experts" in config and g.family.experts is not None:
        config |= dict.fromkeys(g.family.experts.counts, g.experts)
    if plan.host is not g.family:
        config["model_type"] = plan.host.model_type
        for key in g.family.own_keys:
            config.pop(key, None)
        config |= plan.settings
    if plan.custom_code:
        module = MODELING_FILE.removesuffix(".py")
        name = CLASS_PREFIX + plan.host.architecture
        config["architectures"] = [name]
        config["auto_map"] = {"AutoModelForCausalLM": f"{module}.{name}"}
        if plan.host.reads_heads:
            # The class looks at the global counts, which transformers 5 forbids to read unless told so, and then warns,
            # but for a configuration class of our own. Stock classes would now build every layer with them; they still
            # fail to load, because the weights do not fit.
            config["num_attention_heads"], config["num_key_value_heads"] = g.heads, g.kv_heads
            config["allow_global_per_layer_attribute_access"] = True
            config["auto_map"]["AutoConfig"] = f"{module}.{_config_class(plan.host.model_type)}"
        config["per_layer_config"] = {
            str(layer): {"num_attention_heads": heads, "num_key_value_heads": groups}
            for layer, (heads, groups) in enumerate(plan.counts)
        }
    return config


def _config_class(model_type: str) -> str:
    """What transformers calls the configuration class of a family that reads its head counts: Gemma3TextConfig."""
    return "".join(part.capitalize() for part in model_type.split("_")) + "Config"


def _both_rope_spellings(config: dict[str, Any]) -> None:
    """transformers 5 writes `rope_parameters`; 4.57 does not read it and would silently fall back to theta 10000.

    The older spelling is read by both, so a configuration that has it is left alone.
    """
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, Mapping):
        return
    if isinstance(parameters.get("full_attention"), Mapping):
        local = parameters.get("sliding_attention") or {}
        if "rope_theta" in local:
            config[LOCAL_THETA] = local["rope_theta"]
        parameters = parameters["full_attention"]
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in parameters:
            config[key] = parameters[key]
    config["rope_scaling"] = _scaling(parameters, str(config.get("model_type")))


def _scaling(parameters: Mapping[str, Any], model_type: str) -> dict[str, Any] | None:
    """The `rope_scaling` that says the same as `rope_parameters`; None for unscaled positions."""
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return None
    scaling = {k: v for k, v in parameters.items() if k not in ("rope_theta", "partial_rotary_factor")}
    if model_type == "phi3":
        return {key: value for key, value in {**scaling, "type": kind}.items() if key in PHI3_SCALING}
    return scaling


def ships_code(model: Path) -> bool:
    """Whether a model folder needs code that it ships. Only our own code is ever run from an artifact.

    Raises ArtifactError for any other.
    """
    config = json.loads((model / "config.json").read_text("utf-8"))
    if "auto_map" not in config:
        return False
    ours = Path(__file__).with_name(MODELING_FILE).read_bytes()
    if not (model / MODELING_FILE).is_file() or (model / MODELING_FILE).read_bytes() != ours:
        raise ArtifactError(
            f"{model / MODELING_FILE} is not the file that this version of sspcompile ships; it is not run.",
            hint="Build the artifact again.",
        )
    return True
