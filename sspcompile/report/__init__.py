"""Renders one report value to JSON, Markdown, HTML, SVG and the terminal."""

from __future__ import annotations

from sspcompile.report.model import Report
from sspcompile.report.write import write_report

__all__ = ["Report", "write_report"]
