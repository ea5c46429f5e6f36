"""Names of code and files in the JSON files of a model folder: what is written names nothing that is not there.

Code beside a checkpoint is never run here and does not travel, so neither do its names. A name that stays behind makes
transformers look for the file as soon as its user trusts the folder, or ask whether it may fetch it from the hub.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# `auto_map`: classes in files beside the model, or in another repository. `custom_pipelines`: the same for pipelines.
# `transformers_weights`: the file of the weights, where it has another than the usual name.
CODE_KEYS = ("auto_map", "custom_pipelines", "transformers_weights")
TOKENIZER_CONFIG = "tokenizer_config.json"
# Whatever else may name code, and the settings that a processor cannot do without.
SETTINGS, PROCESSORS = "*_config.json", "*processor_config.json"
PROCESSOR = "processor_class"


def without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings without the names of code, and of a weight file, that stay behind."""
    return {key: value for key, value in config.items() if key not in CODE_KEYS}


def drop_references(folder: Path) -> None:
    """Take the names of code out of the settings of tokenizer and processors in a folder that was just written.

    A processor that is such code, or whose settings are not there, is not named either: AutoProcessor then falls back
    to the tokenizer. A file that names nothing of this keeps its bytes, and so does one that is not a JSON object.
    """
    found = {path: settings for path in sorted(folder.glob(SETTINGS)) if (settings := read_settings(path))}
    code = any("AutoProcessor" in _classes(settings) for settings in found.values())
    keeps_processor = any(folder.glob(PROCESSORS)) and not code
    for path, settings in found.items():
        kept = without_code(settings)
        if not keeps_processor:
            kept.pop(PROCESSOR, None)
        if kept != settings:
            path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_settings(path: Path) -> dict[str, Any]:
    """Empty where there is no JSON object; whoever needs the file says so."""
    try:
        settings = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _classes(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    named = settings.get("auto_map")
    return named if isinstance(named, Mapping) else {}
