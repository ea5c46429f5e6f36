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
# A processor needs files of its own; without them AutoProcessor falls back to the tokenizer only when none is named.
TOKENIZER_CONFIG, PROCESSOR = "tokenizer_config.json", "processor_class"


def without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings without the names of code, and of a weight file, that stay behind."""
    return {key: value for key, value in config.items() if key not in CODE_KEYS}


def drop_references(folder: Path) -> None:
    """Take the names of code out of the tokenizer's settings in a folder that was just written.

    A file that names none keeps its bytes, and so does one that is not a JSON object: its readers say so.
    """
    path = folder / TOKENIZER_CONFIG
    try:
        settings = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return
    if not isinstance(settings, dict):
        return
    kept = {key: value for key, value in without_code(settings).items() if key != PROCESSOR}
    if kept != settings:
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", "utf-8")
