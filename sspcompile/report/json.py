"""The report as JSON, and back."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from sspcompile.errors import ArtifactError
from sspcompile.report.model import Report
from sspcompile.report.verdict import verdict


def render_json(report: Report) -> str:
    """Indented ASCII JSON with a final newline; `verdict` is added for people who read only this file."""
    value = report.model_dump(mode="json") | {"verdict": list(verdict(report))}
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def read_report(path: Path) -> Report:
    """A report that `render_json` wrote. Raises ArtifactError when there is none or it is of another schema."""
    try:
        value = json.loads(path.read_text("utf-8"))
        if isinstance(value, dict):
            value.pop("verdict", None)
        return Report.model_validate(value)
    except FileNotFoundError:
        raise ArtifactError(f"There is no report {path}.", hint="Build the artifact again.") from None
    except (ValidationError, ValueError):
        raise ArtifactError(f"{path} is not a report of this version.", hint="Build the artifact again.") from None
