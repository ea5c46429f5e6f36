"""Rotary positions as a configuration states them, in whichever of the spellings.

Three keys can hold the same setting: `rope_parameters` (transformers 5), `rope_scaling` and `rope_theta` (4.57), and
Gemma 3 has a fourth. Where several stand, one is taken, and which one is not to be guessed from their names: see
`convert_rope_params_to_dict` and `standardize_rope_params` in modeling_rope_utils.py of transformers 5.23, and their
overrides in the configurations of Phi-3 and Gemma 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sspcompile.errors import CheckpointError
from sspcompile.families.table import Family

FULL, SLIDING = "full_attention", "sliding_attention"
# The base frequency of Gemma 3's sliding layers in the older spelling.
LOCAL_THETA = "rope_local_base_freq"
# Kinds whose frequencies depend on the context that the model was first trained with.
FROM_ORIGINAL = ("llama3", "yarn", "longrope")
ORIGINAL = "original_max_position_embeddings"
# Phi-3's older names for longrope.
LONGROPE_IN_PHI3 = ("su", "yarn")


@dataclass(frozen=True)
class Positions:
    """`parameters` of full attention, spelt as `rope_parameters`; `local`: those of sliding layers, where they have
    others."""

    parameters: Mapping[str, Any]
    local: Mapping[str, Any] | None = None

    @property
    def kind(self) -> str:
        """The `rope_type`; "default" for positions that are not scaled."""
        return str(self.parameters["rope_type"])


def rope_of(config: Mapping[str, Any], family: Family) -> Positions:
    """The positions that the family's class in transformers 5 computes. Raises CheckpointError for no object."""
    if LOCAL_THETA in family.silent:
        return _of_gemma3(config, family)
    # The older key wins, whole: what else stands in the newer one, its base frequency included, is not looked at.
    parameters = _object(config, "rope_scaling") or _object(config, "rope_parameters") or {}
    if family.window == "layer_types" and (FULL in parameters or SLIDING in parameters):
        raise CheckpointError(
            f"config.json has other positions for each kind of layer, which {family.architecture} does not compute.",
            hint="Give one set of rope_parameters.",
        )
    parameters = _with_theta(parameters, config.get("rope_theta", family.silent["rope_theta"]))
    if config.get("partial_rotary_factor") is not None or family.partial_rotary:
        parameters.setdefault("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if family.partial_rotary and parameters["rope_type"] in LONGROPE_IN_PHI3:
        parameters["rope_type"] = "longrope"
    return Positions(_with_original(parameters, config, family))


def _of_gemma3(config: Mapping[str, Any], family: Family) -> Positions:
    """Both kinds of layers have their own; the older keys only fill what the newer one leaves open."""
    # Without the newer key the kind is settled before the older one is read, unless that says `rope_type`, too.
    unsaid = {FULL: {"rope_type": "default"}}
    parameters = unsaid if config.get("rope_parameters") is None else _object(config, "rope_parameters") or {}
    full, sliding = (dict(_object(parameters, key) or {}) for key in (FULL, SLIDING))
    full |= _object(config, "rope_scaling") or {}
    full = _with_theta(full, config.get("rope_theta", family.silent["rope_theta"]))
    sliding = _with_theta(sliding, config.get(LOCAL_THETA, family.silent[LOCAL_THETA]))
    for kind in (full, sliding):
        if config.get("partial_rotary_factor") is not None:
            kind.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    return Positions(*(_with_original(kind, {**config, ORIGINAL: None}, family) for kind in (full, sliding)))


def _object(config: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    value = config.get(key)
    if value is None or isinstance(value, Mapping):
        return value
    raise CheckpointError(f"config.json has {key} = {value!r:.60}.", hint=f"{key} must be an object or null.")


def _with_theta(parameters: Mapping[str, Any], theta: Any) -> dict[str, Any]:
    found = {"rope_theta": theta, "rope_type": parameters.get("type", "default"), **parameters}
    found.pop("type", None)
    return found


def _with_original(parameters: dict[str, Any], config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """A value beside the object wins over the one in it, by way of Phi-3."""
    if parameters["rope_type"] not in FROM_ORIGINAL:
        return parameters
    beside = config.get(ORIGINAL, family.silent.get(ORIGINAL))
    if beside is not None:
        return {**parameters, ORIGINAL: beside}
    longest = config.get("max_position_embeddings", family.silent["max_position_embeddings"])
    return {ORIGINAL: longest, **parameters}


def positions_of(config: Mapping[str, Any]) -> int | None:
    """The longest text that a configuration is made for, in tokens; None where it does not say.

    That is `max_position_embeddings`, except where it names only what the model was trained on: dynamic scaling starts
    there, and YaRN at its `original_max_position_embeddings`, and both go `factor` times as far (Peng et al., YaRN,
    2023, section 3).
    """
    longest = config.get("max_position_embeddings")
    if type(longest) is not int or longest < 1:
        return None
    # The older spelling wins, as in transformers 5.
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(rope, Mapping) or not isinstance(rope.get("factor"), int | float):
        return longest
    trained = {"dynamic": longest, "yarn": rope.get("original_max_position_embeddings")}
    start = trained.get(rope.get("rope_type", rope.get("type")))
    return max(longest, int(rope["factor"] * start)) if isinstance(start, int) else longest
