"""From what the user typed after `--model` to a folder on disk."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from sspcompile.checkpoint.companions import CODE, FOLDERS, PATTERNS
from sspcompile.checkpoint.foreign import ADAPTER_CONFIG, other_format
from sspcompile.checkpoint.quantised import FILES as QUANTISED_FILES
from sspcompile.checkpoint.source import INDEX_NAME, SINGLE_NAME, absent_shards, refuse_by_configuration
from sspcompile.errors import CheckpointError, InputError

# What a build reads beside the weights, and the card, which names the licence. Anything else that a repository carries
# (pickles, GGUF, code, a second copy of the weights in another format) stays where it is.
SMALL_PATTERNS = [
    *("config.json", INDEX_NAME, ADAPTER_CONFIG, "pytorch_model.bin.index.json", *QUANTISED_FILES),
    *PATTERNS,
    *(f"{folder}/*" for folder in FOLDERS),
    "README.md",
]
HUB_PATTERNS = [*SMALL_PATTERNS, SINGLE_NAME, "model-*-of-*.safetensors"]
# Patterns of the hub match across slashes: every folder but those in FOLDERS, which begin with "ad".
HUB_IGNORED = [*CODE, "[!a]*/*", "a[!d]*/*"]
REVISION = r"[0-9a-f]{40}"

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
            raise _no_config(folder, str(model))
        return folder
    if folder.exists():
        raise other_format(folder, str(model)) or CheckpointError(
            f"{model} is a file.", hint="--model takes the folder that holds config.json."
        )
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
    """A repository of the hub: the small files first, and the weights only of a model that can be cut."""
    folder = _fetched(name, SMALL_PATTERNS)
    if not (folder / "config.json").is_file():
        raise _no_config(folder, name)
    refuse_by_configuration(folder)
    # A snapshot's folder is called by its revision, so that all files are of one.
    revision = folder.name if re.fullmatch(REVISION, folder.name) else None
    _fetched(name, [SINGLE_NAME], revision)
    if absent := absent_shards(folder):  # shards may have any name; the index is the one to say
        _fetched(name, [glob.escape(shard) for shard in absent], revision)
    return folder


def _fetched(name: str, patterns: list[str], revision: str | None = None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=HUB_IGNORED))
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


def _no_config(folder: Path, typed: str) -> InputError:
    return other_format(folder, typed) or CheckpointError(
        f"{typed} has no config.json.", hint="--model takes a Hugging Face model folder or a hub name."
    )
