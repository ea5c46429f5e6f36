"""`compare`: reports of finished builds, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sspcompile.api.arguments import demand, named
from sspcompile.checkpoint import staged, write_manifest
from sspcompile.report.comparison import Points, comparison_page, points_of, render_points
from sspcompile.report.json import read_report
from sspcompile.report.model import Report
from sspcompile.report.write import write_page
from sspcompile.workspace import REPORT, Workspace

NAME = "comparison"


def compare(given: Sequence[str], workspace: Workspace) -> Points:
    """The points of these builds. Raises InputError for anything else: only a build has a report."""
    folders = [demand(named(one, workspace), "build", command="compare").folder for one in given]
    title = "One build" if len(folders) == 1 else f"{len(folders)} builds side by side"
    return points_of(title, _named(folders))


def _named(folders: Sequence[Path]) -> Mapping[str, Report]:
    """By folder name; by whole path where two have the same."""
    names = [folder.name for folder in folders]
    return {
        folder.name if names.count(folder.name) == 1 else str(folder): read_report(folder / REPORT)
        for folder in folders
    }


def write_comparison(points: Points, out: Path, *, overwrite: bool, reads: Sequence[Path] = ()) -> None:
    """comparison.json, .md and .html in a folder of their own; `reads`: the builds. Raises what `staged` raises."""
    with staged(out, overwrite=overwrite, reads=reads) as folder:
        write_page(comparison_page(points), render_points(points), folder, NAME)
        write_manifest(folder, {"artifacts": [point.name for point in points.points]})
