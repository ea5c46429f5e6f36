"""From what the user typed after `--model` to a folder on disk."""

from __future__ import annotations

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path

from sspcompile.checkpoint.adapters import is_adapter_folder, read_adapter
from sspcompile.checkpoint.companions import CODE, FOLDERS, PATTERNS
from sspcompile.checkpoint.foreign import ADAPTER_CONFIG, ADAPTER_WEIGHTS, chosen_snapshot, other_format
from sspcompile.checkpoint.gguf import is_gguf
from sspcompile.checkpoint.hub import REVISION, Repository, commit_of, fetched
from sspcompile.checkpoint.quantised import FILES as QUANTISED_FILES
from sspcompile.checkpoint.source import INDEX_NAME, SINGLE_NAME, absent_shards, refuse_by_configuration
from sspcompile.embedded import EMBEDDED, MODEL_DIR
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


@dataclass(frozen=True)
class Found:
    """A model folder, and how to find it again from any folder.

    `place`: a hub name, `embedded`, or an absolute path. `revision`: the commit of a hub repository. `adapter`: whether
    it is an adapter, which needs its base to be a model. `gguf`: `folder` is a GGUF file, of which one is made.
    """

    folder: Path
    place: str
    revision: str | None = None
    adapter: bool = False
    gguf: bool = False


def embedded_model() -> Path:
    """Folder of the small six-domain model that ships with the package."""
    return MODEL_DIR


def locate(model: str | None) -> Path:
    """The folder of what `find` finds."""
    return find(model).folder


def find(model: str | None) -> Found:
    """A folder with a config.json: the embedded model for None or its name, a local folder, or a hub snapshot. Or a
    folder with an adapter_config.json and no whole weights, or a GGUF file.

    A hub name may end in `@REVISION`. Hub and cache behaviour is huggingface_hub's own (HF_HOME, HF_TOKEN,
    HF_HUB_OFFLINE). Raises CheckpointError.
    """
    if model in (None, EMBEDDED):
        return Found(embedded_model(), EMBEDDED)
    folder = Path(model).expanduser()
    if folder.is_dir():
        folder = model_folder(folder)
        place = os.path.abspath(folder)  # noqa: PTH100 (resolves `..` and keeps symbolic links)
        if is_adapter_folder(folder):
            return Found(folder, place, adapter=True)
        if not (folder / "config.json").is_file():
            raise _no_config(folder, str(model))
        return Found(folder, place)
    if is_gguf(folder):
        return Found(folder, os.path.abspath(folder), gguf=True)  # noqa: PTH100
    if folder.exists():
        raise other_format(folder, str(model)) or CheckpointError(
            f"{model} is a file.", hint="--model takes the folder that holds config.json, or a file NAME.gguf."
        )
    if not is_hub_name(str(model)):
        raise CheckpointError(
            f"There is no model folder {model}.",
            hint="--model takes a folder with config.json, or a hub name such as Qwen/Qwen2.5-7B-Instruct.",
        )
    name, at, revision = str(model).partition("@")
    if at and not re.fullmatch(REVISION, revision):
        raise CheckpointError(
            f"{revision!r:.80} is not a revision.", hint=f"Give a branch, a tag or a commit of {name}."
        )
    snapshot = _snapshot(name, revision or None)
    return Found(snapshot, name, commit_of(snapshot) or revision or None, is_adapter_folder(snapshot))


def read_paths(model: str | None) -> tuple[Path, ...]:
    """What of this machine's files `--model` names: a folder, an adapter's with its base, or a GGUF file. Nothing for
    what is not there, such as a hub name, whose snapshot lies in the hub's own cache.

    Raises what `read_adapter` raises.
    """
    if model in (None, EMBEDDED):
        return (embedded_model(),)
    place = Path(model).expanduser()
    if not place.is_dir():
        return (place,) if place.is_file() else ()
    folder = model_folder(place)
    if not is_adapter_folder(folder):
        return (folder,)
    base = Path(read_adapter(folder, str(model)).base).expanduser()
    return (folder, model_folder(base)) if base.is_dir() else (folder,)


def model_folder(folder: Path) -> Path:
    """The folder itself, or the snapshot that a hub cache's folder `models--OWNER--NAME` stands for."""
    return folder if (folder / "config.json").is_file() else chosen_snapshot(folder) or folder


def is_hub_name(text: str) -> bool:
    """Whether a text has the form OWNER/NAME or OWNER/NAME@REVISION; whether the hub has it is another question."""
    name = text.partition("@")[0]
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def at_revision(model: str | None, revision: str | None) -> str | None:
    """`model` with its revision in one word, as `find` takes it. Raises InputError for a model that has none."""
    if revision is None:
        return model
    if model is None or model == EMBEDDED or Path(model).expanduser().exists() or not is_hub_name(model):
        said = "no model is named" if model is None else f"{model} is none"
        raise InputError(
            f"The revision {revision!r:.80} is for a model of the hub, and {said}.",
            hint="Leave the revision out, or give a hub name with --model.",
        )
    if "@" in model:
        raise InputError(
            f"{model} names its revision, and {revision!r:.80} is given beside it.", hint="Give one of them."
        )
    return f"{model}@{revision}"


def _snapshot(name: str, revision: str | None) -> Path:
    """A repository of the hub: the small files first, and the weights only of a model that can be cut."""
    folder = _fetched(name, SMALL_PATTERNS, revision)
    if not (folder / "config.json").is_file() and is_adapter_folder(folder):
        read_adapter(folder, name)
        _fetched(name, [ADAPTER_WEIGHTS], commit_of(folder) or revision)
        return folder
    if not (folder / "config.json").is_file():
        raise _no_config(folder, name)
    refuse_by_configuration(folder)
    commit = commit_of(folder) or revision
    _fetched(name, [SINGLE_NAME], commit)
    if absent := absent_shards(folder):  # shards may have any name; the index is the one to say
        _fetched(name, [glob.escape(shard) for shard in absent], commit)
    return folder


def _fetched(name: str, patterns: list[str], revision: str | None) -> Path:
    wanted = Repository(name, revision, "model", CheckpointError, "a local folder with --model")
    return fetched(wanted, patterns, HUB_IGNORED)


def _no_config(folder: Path, typed: str) -> InputError:
    return other_format(folder, typed) or CheckpointError(
        f"{typed} has no config.json.", hint="--model takes a Hugging Face model folder or a hub name."
    )
