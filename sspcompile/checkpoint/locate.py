"""From what the user typed after `--model` to a folder on disk."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from sspcompile.checkpoint.companions import CODE, FOLDERS, PATTERNS
from sspcompile.checkpoint.foreign import ADAPTER_CONFIG, no_config, not_a_folder
from sspcompile.checkpoint.quantised import FILES as QUANTISED_FILES
from sspcompile.checkpoint.source import INDEX_NAME, SINGLE_NAME, absent_shards
from sspcompile.errors import CheckpointError

# What a build reads, and the card, which names the licence. Anything else that a repository carries beside it (pickles,
# GGUF, code, a second copy of the weights in another format) stays where it is.
HUB_PATTERNS = [
    *("config.json", SINGLE_NAME, INDEX_NAME, "model-*-of-*.safetensors"),
    *(ADAPTER_CONFIG, "pytorch_model.bin.index.json", *QUANTISED_FILES),
    *PATTERNS,
    *(f"{folder}/*" for folder in FOLDERS),
    "README.md",
]
# Patterns of the hub match across slashes: every folder but those in FOLDERS, which begin with "ad".
HUB_IGNORED = [*CODE, "[!a]*/*", "a[!d]*/*"]

# What artifacts call the model that ships with the package; a folder of that name is `./embedded`.
EMBEDDED = "embedded"


def embedded_model() -> Path:
    """Folder of the small six-domain model that ships with the package."""
    from sspcompile.embedded import MODEL_DIR

    return MODEL_DIR


def locate(model: str | None) -> Path:
    """A folder with a config.json: the embedded model for None or its name, a local folder, or a hub snapshot.

    Hub and cache behaviour is huggingface_hub's own (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE). Raises CheckpointError.
    """
    if model in (None, EMBEDDED):
        return embedded_model()
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise no_config(folder, str(model))
        return folder
    if folder.exists():
        raise not_a_folder(str(model))
    if not is_hub_name(str(model)):
        raise CheckpointError(
            f"There is no model folder {model}.",
            hint="--model takes a folder with config.json, or a hub name such as Qwen/Qwen2.5-7B-Instruct.",
        )
    return _snapshot(model)


def is_hub_name(text: str) -> bool:
    """Whether a text has the form OWNER/NAME; whether the hub has it is another question."""
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and not text.endswith("/")


def _snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=HUB_PATTERNS, ignore_patterns=HUB_IGNORED))
        if (folder / "config.json").is_file() and (absent := absent_shards(folder)):
            # Shards may have any name; the index is the one to say. A snapshot's folder is called by its revision.
            snapshot_download(name, revision=folder.name, allow_patterns=[glob.escape(shard) for shard in absent])
    except HFValidationError as error:
        raise CheckpointError(f"{name!r} is neither a folder nor a valid hub name.", hint="Try OWNER/NAME.") from error
    except LocalEntryNotFoundError as error:
        state = "offline" if os.environ.get("HF_HUB_OFFLINE") else "unreachable"
        raise CheckpointError(
            f"There is no folder {name}, the hub is {state}, and {name} is not in the local cache.",
            hint="Give a local folder with --model, or download it first with `hf download`.",
        ) from error
    except HfHubHTTPError as error:
        raise CheckpointError(
            f"The hub has no readable repository {name}: {str(error).splitlines()[0]}",
            hint="Check the name, and HF_TOKEN if it is gated.",
        ) from error
    if not (folder / "config.json").is_file():
        raise no_config(folder, name)
    return folder
