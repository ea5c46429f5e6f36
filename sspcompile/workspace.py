"""Where things lie: artifacts, toolkits, exports, and which build was the last."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sspcompile.checkpoint.publish import write_atomically
from sspcompile.errors import ArtifactError

MASK, PLAN, RECIPE, PROBES = "mask.json", "plan.json", "recipe.yaml", "parity.json"
MODEL, REPORT = "model", "report.json"
# In the model folder of a nested artifact: its members, and what the class beside it reads.
NESTED = "nested.json"
# Of a model whose vocabulary was trimmed: which tokens stayed, and what that cost.
TRIM = "trim.json"


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

    @property
    def toolkits(self) -> Path:
        return self.artifacts / "toolkits"

    @property
    def latency_tables(self) -> Path:
        """What decoding was measured to take on this machine, a file for each model and load."""
        return self.artifacts / "latency-tables"

    def toolkit(self, fingerprint: str) -> Path:
        return self.toolkits / fingerprint

    def artifact(self, name: str) -> Path:
        return self.artifacts / name

    def remember(self, artifact: Path) -> None:
        """Make `artifact` the last build: its name when it lies in the default place, its path otherwise."""
        self.artifacts.mkdir(parents=True, exist_ok=True)
        inside = artifact.absolute().parent == self.artifacts.absolute()
        write_atomically(self.artifacts / "last", (artifact.name if inside else str(artifact.absolute())) + "\n")

    def last(self) -> Path:
        """The folder of the last build. Raises ArtifactError when there is none, or when it is gone."""
        try:
            given = (self.artifacts / "last").read_text("utf-8").strip()
        except FileNotFoundError as error:
            raise ArtifactError(
                f"There is no last build in {self.artifacts}.",
                hint='Run `sspcompile build --scenario "..."` first, or name an artifact.',
            ) from error
        folder = self.artifacts / given  # a path is whole, and stays what it is
        if not _is_build(folder):
            raise ArtifactError(
                f"The last build, {given}, is gone.", hint="Run `sspcompile build` again, or name an artifact."
            )
        return folder


def _is_build(folder: Path) -> bool:
    return (folder / MASK).is_file() or (folder / MODEL / NESTED).is_file()
