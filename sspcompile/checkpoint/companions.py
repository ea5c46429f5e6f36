"""The files that belong to a model beside configuration and weights: tokenizer, templates, settings, licence.

They go from folder to folder byte for byte. What does not go is told, so that nothing is lost without a word.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from sspcompile.errors import CheckpointError

# Whatever some tokenizer of transformers, vLLM, mistral-common or llama.cpp reads.
TOKENIZER = (
    "tokenizer*",
    "tekken*.json",
    "vocab*",
    "merges*",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.model.v*",
    "*.tiktoken",
    "*.spm",
    "*.bpe",
    "bpe.codes",
    "dict.txt",
    "encoder.json",
)
TEMPLATES = ("chat_template*", "*.jinja", "SYSTEM_PROMPT*", "system_prompt*")
SETTINGS = ("generation_config.json", "*processor_config.json")
LICENCES = (
    *("LICEN[CS]E*", "[Ll]icen[cs]e*", "NOTICE*", "[Nn]otice*", "COPYING*", "PATENTS*"),
    *("*USE_POLICY*", "*[Uu]se_[Pp]olicy*", "*TERMS*", "*[Tt]erms_of_[Uu]se*"),
)
PATTERNS = (*TOKENIZER, *TEMPLATES, *SETTINGS, *LICENCES)
# Where transformers looks for named templates.
FOLDERS = ("additional_chat_templates",)
# Never taken along: a cut runs no code but its own, and weights are not copied by their name.
CODE = ("*.py", "*.pyc", "*.so")
NEVER = (*CODE, "*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
# Written anew, or no part of the model.
UNTOLD = ("config.json", "README.md", "manifest.json", "trim.json", ".*")


def copy_companions(source: Path, target: Path, *, wanted: Callable[[str], bool] = bool) -> list[str]:
    """Copy what a loader may read of a model folder, as far as it is `wanted`; returns the relative paths, sorted.

    Raises what `companions` raises.
    """
    names = [name for name in companions(source) if wanted(name)]
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    return names


def of_tokenizer(name: str) -> bool:
    """Whether a companion belongs to the tokenizer, its templates included."""
    return _matches(name.rpartition("/")[2], (*TOKENIZER, *TEMPLATES))


def companions(folder: Path) -> list[str]:
    """The files that go with a model, relative to its folder, sorted.

    Links are followed as far as they stay in the folder or, in a hub cache, in its store; a folder that is a link is
    not entered. Raises CheckpointError for a tokenizer's file that is a link to elsewhere: the copy would lack it.
    """
    found = []
    for path in _candidates(folder):
        name = path.relative_to(folder).as_posix()
        if _matches(path.name, NEVER):
            continue
        if _stays(path, folder):
            found.append(name)
        elif _matches(name, TOKENIZER):
            raise CheckpointError(
                f"{path} is a link that leaves the model folder, and is not followed.",
                hint="Put the file itself there.",
            )
    return sorted(found)


def left_out(folder: Path, read: Collection[str]) -> list[str]:
    """What lies in a model folder and does not go with a cut, sorted; folders end in a slash.

    `read` names the files whose content is in the cut already.
    """
    copied = companions(folder)
    entered = {name.partition("/")[0] for name in copied if "/" in name}
    found = [
        path.name + "/" * path.is_dir()
        for path in folder.iterdir()
        if path.name not in {*copied, *read, *entered} and not _matches(path.name, UNTOLD)
    ]
    inside = [path.relative_to(folder).as_posix() for name in entered for path in _files(folder / name)]
    return sorted([*found, *(name for name in inside if name not in copied)])


def _candidates(folder: Path) -> Iterator[Path]:
    """Files that would go with the model if they are not links to elsewhere."""
    yield from (path for path in folder.iterdir() if path.is_file() and _matches(path.name, PATTERNS))
    for name in FOLDERS:
        if not (folder / name).is_symlink():
            yield from (path for path in _files(folder / name) if path.is_file())


def _files(folder: Path) -> Iterator[Path]:
    """Every file below a folder; folders that are links are not entered."""
    for place, _, files in os.walk(folder):
        yield from (Path(place, file) for file in files)


def _stays(path: Path, folder: Path) -> bool:
    """Whether a file lies in the folder, or in the store of the hub cache that the folder is a snapshot of."""
    inside = folder.resolve()
    store = inside.parent.parent / "blobs" if inside.parent.name == "snapshots" else inside
    real = path.resolve()
    return real.is_relative_to(inside) or real.is_relative_to(store)


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
