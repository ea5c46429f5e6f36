"""manifest.json: what every file of an artifact is, and what the artifact was made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sspcompile.checkpoint.headers import read_header
from sspcompile.errors import ArtifactError, InputError

SCHEMA_VERSION = 1
NAME = "manifest.json"
WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class Manifest:
    """`files`: relative path -> sha256, size in bytes, and for weights the tensors. `origin`: fingerprints, seeds.

    Weights that were cut as a stream, without being looked at, may have no sha256.
    """

    files: Mapping[str, Mapping[str, Any]]
    origin: Mapping[str, Any]


def _describe(path: Path, *, hashed: bool = True) -> dict[str, Any]:
    entry: dict[str, Any] = {"size": path.stat().st_size}
    if hashed:
        with path.open("rb") as stream:
            entry["sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
    if path.suffix == WEIGHTS:
        entry["tensors"] = {
            name: {"dtype": info.dtype, "shape": list(info.shape)} for name, info in read_header(path).items()
        }
    return entry


def write_manifest(folder: Path, origin: Mapping[str, Any], *, hash_weights: bool = True) -> Manifest:
    """Describe every file under `folder` and write manifest.json there. No clock enters: equal builds, equal bytes."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / NAME)
    files = {
        path.relative_to(folder).as_posix(): _describe(path, hashed=hash_weights or path.suffix != WEIGHTS)
        for path in paths
    }
    text = json.dumps(
        {"schema_version": SCHEMA_VERSION, "origin": dict(origin), "files": files}, indent=1, sort_keys=True
    )
    (folder / NAME).write_text(text + "\n", "utf-8")
    return Manifest(files=files, origin=dict(origin))


def read_manifest(folder: Path) -> Manifest:
    """Open manifest.json. Raises ArtifactError when it is missing, unreadable or of another schema version."""
    path = folder / NAME
    try:
        value = json.loads(path.read_text("utf-8"))
        if value["schema_version"] != SCHEMA_VERSION:
            raise ArtifactError(
                f"{path} has schema version {value['schema_version']}.", hint=f"This version reads {SCHEMA_VERSION}."
            )
        files = {str(name): dict(entry) for name, entry in value["files"].items()}
        return Manifest(files=files, origin=dict(value["origin"]))
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{folder} is not an artifact: it has no {NAME}.", hint="Run `sspcompile build`."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged.", hint="Run `sspcompile build` again.") from error


def check_manifest(folder: Path) -> Manifest:
    """Compare every file with the manifest. Raises ArtifactError naming the first file that differs.

    Files that the manifest does not name are no concern of it: an artifact may be given a note or a benchmark.
    """
    manifest = read_manifest(folder)
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p != folder / NAME}
    if missing := set(manifest.files) - present:
        raise ArtifactError(f"{folder} lacks {min(missing)}.", hint="Run `sspcompile build` again.")
    for name, entry in manifest.files.items():
        try:
            same = _describe(folder / name, hashed="sha256" in entry or not name.endswith(WEIGHTS)) == entry
        except InputError:  # a header that can no longer be read
            same = False
        if not same:
            raise ArtifactError(
                f"{folder / name} is not the file that was built (sha256 or size differs).", hint="Build it again."
            )
    return manifest
