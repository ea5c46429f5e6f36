"""Sliding windows as a configuration states them: a size, a switch and a list of layers, which can contradict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sspcompile.errors import CheckpointError
from sspcompile.families.table import Family

FULL, SLIDING = "full_attention", "sliding_attention"
Config = Mapping[str, Any]


def windows_of(config: Config, family: Family, layers: int) -> tuple[int | None, ...]:
    """Per layer how many keys a query sees, itself included; None for all before it.

    As the mask of the family's class in transformers 5 has it (sdpa and eager; flash attention reads the switch of
    SmolLM3 once more). Raises CheckpointError for settings with which the class cannot run.
    """
    window = _size(config, family)
    if family.window == "":
        return (None,) * layers
    if family.window == "every":
        return (window,) * layers
    kinds = _kinds(config, family, layers, window)
    if window is None and SLIDING in kinds:
        raise CheckpointError(
            "config.json has sliding layers in layer_types and no sliding_window in force.",
            hint="Set sliding_window (and use_sliding_window), or make every layer full_attention.",
        )
    return tuple(window if kind == SLIDING else None for kind in kinds)


def stray_window(config: Config, family: Family) -> str | None:
    """The key that gives windows to a class that has none, or None.

    Such a class attends to everything in one pass, but the cache of transformers keeps no more than the window, so
    that what it generates depends on how the text was fed.
    """
    if family.window:
        return None
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and kinds:
        return "layer_types" if set(kinds) != {FULL} else None
    return next((key for key in ("sliding_window", "attention_chunk_size") if config.get(key) is not None), None)


def is_windowed(config: Config, family: Family, layers: int) -> bool:
    """Whether any layer has a window, by its mask or by its cache. Raises CheckpointError like `windows_of`."""
    return any(window is not None for window in windows_of(config, family, layers)) or bool(
        stray_window(config, family)
    )


def turned_layers(config: Config, family: Family, layers: int) -> tuple[bool, ...]:
    """Per layer whether queries and keys are turned by their position; SmolLM3 leaves some as they are.

    Raises CheckpointError for a list that is too short.
    """
    if "no_rope_layer_interval" not in family.silent:
        return (True,) * layers
    turned = config.get("no_rope_layers")
    if turned is None:
        interval = config.get("no_rope_layer_interval", family.silent["no_rope_layer_interval"])
        if type(interval) is not int or interval < 1:
            raise CheckpointError(f"config.json has no_rope_layer_interval = {interval!r:.60}.", hint="Give 1 or more.")
        return tuple((index + 1) % interval != 0 for index in range(layers))
    if not isinstance(turned, list) or len(turned) < layers:
        raise CheckpointError("config.json has no_rope_layers that misses layers.", hint=f"Give {layers} numbers.")
    return tuple(bool(value) for value in turned[:layers])


def _size(config: Config, family: Family) -> int | None:
    window = config.get("sliding_window", family.silent.get("sliding_window"))
    if window is not None and (type(window) is not int or window < 1):
        raise CheckpointError(
            f"config.json has sliding_window = {window!r:.60}.", hint="sliding_window must be 1 or more, or null."
        )
    if family.window_switch is not None and not config.get(family.window_switch, False):
        return None
    return window


def _kinds(config: Config, family: Family, layers: int, window: int | None) -> list[str]:
    kinds = config.get("layer_types")
    if kinds is None:
        slides = SLIDES[family.model_type]
        return [SLIDING if slides(config, family, index, window) else FULL for index in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers:
        count = len(kinds) if isinstance(kinds, list) else "no"
        raise CheckpointError(
            f"config.json has {count} layer_types for {layers} layers.", hint=f"Give {layers}, or none."
        )
    kinds = [FULL if kind == "attention" else kind for kind in kinds]
    if unknown := [kind for kind in kinds if kind not in (FULL, SLIDING)]:
        raise CheckpointError(
            f"config.json has {unknown[0]!r:.60} among its layer_types.", hint=f"Accepted: {FULL}, {SLIDING}."
        )
    return kinds


def _behind_full_layers(config: Config, family: Family, index: int, window: int | None) -> bool:
    return window is not None and index >= config.get("max_window_layers", family.silent["max_window_layers"])


def _without_positions(config: Config, family: Family, index: int, window: int | None) -> bool:
    switched = config.get("use_sliding_window", False) and window is not None
    return bool(switched) and not turned_layers(config, family, index + 1)[index]


def _but_every(count: str | int) -> Callable[..., bool]:
    def slides(config: Config, family: Family, index: int, window: int | None) -> bool:
        return (index + 1) % (config.get(count, 6) if isinstance(count, str) else count) != 0

    return slides


# Which layers slide where `layer_types` is silent.
SLIDES: Mapping[str, Callable[[Config, Family, int, int | None], bool]] = {
    "ministral": lambda config, family, index, window: window is not None,
    "qwen2": _behind_full_layers,
    "qwen3": _behind_full_layers,
    "gemma2": _but_every(2),
    "gemma3_text": _but_every("sliding_window_pattern"),
    "smollm3": _without_positions,
}
