"""Repositories of the hub, fetched by huggingface_hub into its own cache. What goes wrong there is said in one line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sspcompile.errors import InputError

COMMIT = r"[0-9a-f]{40}"
# What git allows in the name of a branch or tag, as far as it cannot lead out of a folder.
REVISION = r"(?!.*(\.\.|//))[\w][\w./+-]*"


@dataclass(frozen=True)
class Repository:
    """A repository by its name OWNER/NAME, at `revision` (branch, tag or commit; the main branch for None).

    `refused`: the class of errors about it. `instead`: what may be given in its place.
    """

    name: str
    revision: str | None
    kind: Literal["model", "dataset"]
    refused: type[InputError]
    instead: str

    @property
    def shown(self) -> str:
        return f"revision {self.revision} of {self.name}" if self.revision else self.name


@dataclass(frozen=True)
class Listed:
    """The files of a repository with their bytes, by their paths in it, and its commit (None where none is known).

    `whole`: whether the hub was asked; its cache holds what was fetched before.
    """

    files: dict[str, int]
    commit: str | None
    whole: bool


def fetched(repository: Repository, patterns: Sequence[str], ignored: Sequence[str] = ()) -> Path:
    """The folder of a snapshot that holds the files of these patterns. Raises `repository.refused`."""
    from huggingface_hub import snapshot_download

    with _told(repository):
        return Path(
            snapshot_download(
                repository.name,
                repo_type=repository.kind,
                revision=repository.revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(ignored),
            )
        )


def listed(repository: Repository, patterns: Sequence[str]) -> Listed:
    """The files of these patterns, on the hub, or in its cache where the hub is out of reach.

    Raises `repository.refused`.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    try:
        with _told(repository):
            found = snapshot_download(
                repository.name,
                repo_type=repository.kind,
                revision=repository.revision,
                allow_patterns=list(patterns),
                dry_run=True,
            )
        commits = {info.commit_hash for info in found}
        return Listed({info.filename: info.file_size or 0 for info in found}, commits.pop() if commits else None, True)
    except DryRunError:
        folder = fetched(repository, [])  # asked for files, it refuses a snapshot that lacks one of them
    paths = (path for pattern in patterns for path in folder.rglob(pattern) if path.is_file())
    return Listed(
        {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}, commit_of(folder), False
    )


def commit_of(snapshot: Path) -> str | None:
    """A snapshot's folder is called by its commit; asked for by it, all files are of one."""
    return snapshot.name if re.fullmatch(COMMIT, snapshot.name) else None


@contextmanager
def _told(repository: Repository) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RevisionNotFoundError

    name, refused = repository.name, repository.refused
    model = repository.kind == "model"
    try:
        yield
    except HFValidationError as error:
        what = "neither a folder nor" if model else "not"
        raise refused(f"{name!r} is {what} a valid hub name.", hint="Try OWNER/NAME.") from error
    except LocalEntryNotFoundError as error:
        state = "offline" if os.environ.get("HF_HUB_OFFLINE") else "unreachable"
        raise refused(
            (f"There is no folder {name}, the" if model else "The")
            + f" hub is {state}, and {repository.shown} is not in the local cache.",
            hint=f"Give {repository.instead}, or download it first with `hf download"
            + ("`." if model else f" {name} --repo-type dataset`."),
        ) from error
    except RevisionNotFoundError as error:
        raise refused(
            f"{name} has no revision {repository.revision} on the hub.",
            hint="Give a branch, a tag or a whole commit of it.",
        ) from error
    except HfHubHTTPError as error:
        raise refused(
            f"The hub has no readable repository {name}: {str(error).splitlines()[0]}",
            hint="Check the name, and HF_TOKEN if it is gated.",
        ) from error
