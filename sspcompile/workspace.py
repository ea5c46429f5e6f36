"""Where things lie: artifacts, toolkits, exports, and which build was the last."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sspcompile.checkpoint.publish import write_atomically
from sspcompile.errors import ArtifactError

MASK, PLAN, RECIPE, PROBES = "mask.json", "plan.json", "recipe.yaml", "parity.json"
MODEL, REPORT = "model", "report.json"


def name_of(folder: Path) -> str:
    """What a folder is called, also where it was typed as `.` or `..`; a symbolic link has its own name."""
    return os.path.basename(os.path.abspath(folder))  # noqa: PTH100, PTH119 (resolve() would follow the link)


@dataclass(frozen=True)
class Workspace:
    """Default outputs under one folder, the current one unless said otherwise."""

    root: Path

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def exported(self) -> Path:
        return self.root / "exported"

    def toolkit(self, fingerprint: str) -> Path:
        return self.artifacts / "toolkits" / fingerprint

    def artifact(self, name: str) -> Path:
        return self.artifacts / name

    def remember(self, artifact: Path) -> None:
        """Make `artifact` the last build: its name when it lies in the default place, its path otherwise."""
        self.artifacts.mkdir(parents=True, exist_ok=True)
        inside = artifact.absolute().parent == self.artifacts.absolute()
        write_atomically(self.artifacts / "last", (artifact.name if inside else str(artifact.absolute())) + "\n")

    def find(self, given: str | None) -> Path:
        """The artifact that the user named by folder or by name, or the last build. Raises ArtifactError."""
        if given is None:
            try:
                given = (self.artifacts / "last").read_text("utf-8").strip()
            except FileNotFoundError as error:
                raise ArtifactError(
                    f"There is no last build in {self.artifacts}.",
                    hint='Run `sspcompile build --scenario "..."` first, or name an artifact.',
                ) from error
        for folder in (Path(given), self.artifact(given)):
            if (folder / MASK).is_file():
                return folder
        raise ArtifactError(f"{given} is no artifact.", hint="Name a folder that `sspcompile build` made.")
