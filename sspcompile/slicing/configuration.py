"""config.json of the smaller model, readable by transformers 4.57 and 5 alike."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sspcompile.checkpoint.references import without_code
from sspcompile.errors import ArtifactError
from sspcompile.families import (
    Family,
    Host,
    Positions,
    hosted_config,
    rope_of,
    shallower,
    without_attention,
    without_layers,
)
from sspcompile.families.positions import FULL, LOCAL_THETA, ORIGINAL, SLIDING
from sspcompile.slicing.plan import SlicePlan

MODELING_FILE = "modeling_sspcompile.py"
CLASS_PREFIX = "PerLayer"
# transformers 4.57 has Phi-3 check that rope_scaling holds these and no other keys.
PHI3_SCALING = ("type", "short_factor", "long_factor")


def sliced_config(source: Mapping[str, Any], plan: SlicePlan) -> dict[str, Any]:
    """The configuration of the cut: one value for every setting, whichever key a reader looks at.

    An uncut model keeps its own, without the names of code that does not travel with it.
    """
    config = without_code(copy.deepcopy(dict(source)))
    if plan.keeps_everything:
        return config
    g = plan.geometry
    config = without_layers(config, g, plan.staying)
    attending = [place for place, layer in enumerate(plan.staying) if layer not in plan.silent]
    config = without_attention(config, shallower(g, plan.staying), attending)
    rope = rope_of(source, g.family)
    if plan.host is not g.family:
        config = hosted_config(config, g, Host(plan.host, plan.settings))
    config["head_dim"] = g.head_dim
    config["num_attention_heads"] = max(heads for heads, _ in plan.counts)
    config["num_key_value_heads"] = max(groups for _, groups in plan.counts)
    if g.has_channels:
        config[g.family.width] = max(plan.widths)
    config["architectures"] = [plan.host.architecture]
    # Silent defaults differ between families and versions.
    config["tie_word_embeddings"] = g.tied
    config |= _every_spelling(rope, plan.host)
    if "torch_dtype" in config and "dtype" in config:  # the newer one is taken where both are known
        config["torch_dtype"] = config["dtype"]
    if "num_local_experts" in config and g.family.experts is not None:
        config |= dict.fromkeys(g.family.experts.counts, g.experts)
    if plan.custom_code:
        config |= _per_layer(plan)
    return config


def _per_layer(plan: SlicePlan) -> dict[str, Any]:
    """What the class in the folder reads, and what transformers needs to find it."""
    module, name = MODELING_FILE.removesuffix(".py"), CLASS_PREFIX + plan.host.architecture
    counts, widths = zip(*((plan.counts[layer], plan.widths[layer]) for layer in plan.staying), strict=True)
    apart = len(set(widths)) > 1
    classes = {"AutoModelForCausalLM": f"{module}.{name}"}
    if plan.host.experts is None:  # transformers 5 leaves the experts of a bare decoder random, without a word
        # vLLM's Transformers backend builds the decoder alone.
        classes["AutoModel"] = f"{module}.{CLASS_PREFIX}{plan.host.decoder}"
    config: dict[str, Any] = {
        "architectures": [name],
        "auto_map": classes,
        "per_layer_config": {
            str(layer): {"num_attention_heads": heads, "num_key_value_heads": groups}
            | ({plan.host.width: width} if apart else {})
            for layer, ((heads, groups), width) in enumerate(zip(counts, widths, strict=True))
        },
    }
    if plan.host.reads_heads:
        # The class looks at the global counts, which transformers 5 forbids to read unless told so, and then warns, but
        # for a configuration class of our own. Stock classes would now build every layer with them; they still fail to
        # load, because the weights do not fit.
        g = plan.geometry
        config |= {"num_attention_heads": g.heads, "num_key_value_heads": g.kv_heads}
        config["allow_global_per_layer_attribute_access"] = True
        classes["AutoConfig"] = f"{module}.{_config_class(plan.host.model_type)}"
    return config


def _config_class(model_type: str) -> str:
    """What transformers calls the configuration class of a family that reads its head counts: Gemma3TextConfig."""
    return "".join(part.capitalize() for part in model_type.split("_")) + "Config"


def _every_spelling(rope: Positions, host: Family) -> dict[str, Any]:
    """transformers 5 writes `rope_parameters`; 4.57 does not read it and would silently fall back to theta 10000.

    Where all stand, transformers 5 takes the older ones.
    """
    full, local = dict(rope.parameters), rope.local
    config: dict[str, Any] = {"rope_theta": full["rope_theta"], "rope_scaling": _scaling(rope, host)}
    if "partial_rotary_factor" in full:
        config["partial_rotary_factor"] = full["partial_rotary_factor"]
    if ORIGINAL in host.silent and ORIGINAL in full:
        config[ORIGINAL] = full[ORIGINAL]
    if local is None:
        return {**config, "rope_parameters": full}
    config[LOCAL_THETA] = local["rope_theta"]
    return {**config, "rope_parameters": {FULL: full, SLIDING: dict(local)}}


def _scaling(rope: Positions, host: Family) -> dict[str, Any] | None:
    """The `rope_scaling` that says the same as `rope_parameters`; None for unscaled positions."""
    if rope.kind == "default":
        return None
    scaling = {k: v for k, v in rope.parameters.items() if k not in ("rope_theta", "partial_rotary_factor")}
    if host.model_type == "phi3":
        return {key: value for key, value in {**scaling, "type": rope.kind}.items() if key in PHI3_SCALING}
    return scaling


def ships_code(model: Path) -> bool:
    """Whether a model folder needs code that it ships. Only our own code is ever run from an artifact.

    A folder that names other code is loaded by the stock class of its model_type. Raises ArtifactError for a class of
    ours whose file is missing or changed.
    """
    config = json.loads((model / "config.json").read_text("utf-8"))
    named = config.get("auto_map")
    classes = named.values() if isinstance(named, Mapping) else ()
    if not any(str(name).startswith(MODELING_FILE.removesuffix("py")) for name in classes):
        return False
    ours = Path(__file__).with_name(MODELING_FILE).read_bytes()
    if not (model / MODELING_FILE).is_file() or (model / MODELING_FILE).read_bytes() != ours:
        raise ArtifactError(
            f"{model / MODELING_FILE} is not the file that this version of sspcompile ships; it is not run.",
            hint="Build the artifact again.",
        )
    return True
