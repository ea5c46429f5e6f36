"""`compare`: reports of finished builds, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sspcompile.checkpoint import staged, write_manifest
from sspcompile.report.json import read_report
from sspcompile.report.model import Report
from sspcompile.report.points import Points, comparison_page, points_of, render_points
from sspcompile.report.write import write_page
from sspcompile.workspace import REPORT, Workspace, name_of

NAME = "comparison"


def compare(given: Sequence[str], workspace: Workspace) -> Points:
    """The points of these artifacts. Raises ArtifactError for what is none."""
    folders = [workspace.find(one) for one in given]
    return points_of(f"{len(folders)} builds side by side", _named(folders))


def _named(folders: Sequence[Path]) -> Mapping[str, Report]:
    """By folder name; by whole path where two have the same."""
    names = [name_of(folder) for folder in folders]
    return {
        name if names.count(name) == 1 else str(folder): read_report(folder / REPORT)
        for name, folder in zip(names, folders, strict=True)
    }


def write_comparison(points: Points, out: Path, *, overwrite: bool) -> None:
    """comparison.json, .md and .html in a folder of their own. Raises OutputExistsError."""
    with staged(out, overwrite=overwrite) as folder:
        write_page(comparison_page(points), render_points(points), folder, NAME)
        write_manifest(folder, {"artifacts": [point.name for point in points.points]})
