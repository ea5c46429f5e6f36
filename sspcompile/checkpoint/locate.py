"""From what the user typed after `--model` to a folder on disk."""

from __future__ import annotations

import os
from pathlib import Path

from sspcompile.errors import CheckpointError

# What a build reads; leaves out .bin, .pt, .gguf and whatever else a repository carries beside safetensors.
HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.tiktoken", "merges.txt", "vocab.txt", "LICENSE*"]

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
            raise CheckpointError(
                f"{model} has no config.json.", hint="--model takes a Hugging Face model folder or a hub name."
            )
        return folder
    if folder.exists():
        raise CheckpointError(f"{model} is a file.", hint="--model takes the folder that holds config.json.")
    if not is_hub_name(model):
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
        return Path(snapshot_download(name, allow_patterns=HUB_PATTERNS))
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
