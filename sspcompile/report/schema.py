"""JSON schemas of what users may read by program: python -m sspcompile.report.schema FOLDER."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from sspcompile.bench.latency import BenchResult
from sspcompile.bench.serving import ServersResult
from sspcompile.report.comparison import Points
from sspcompile.report.model import Report


def _report() -> dict[str, Any]:
    schema = Report.model_json_schema(mode="serialization")
    sentences = {"type": "array", "items": {"type": "string"}, "description": "The findings in plain sentences."}
    schema["properties"]["verdict"] = sentences
    return schema


def _measured(kind: type[BenchResult] | type[ServersResult]) -> dict[str, Any]:
    schema = TypeAdapter(kind).json_schema(mode="serialization")
    definition = {"type": "object", "properties": {"unit": {"type": "string"}, "definition": {"type": "string"}}}
    schema["properties"] |= {
        "schema_version": {"type": "integer"},
        "definitions": {"type": "object", "additionalProperties": definition},
    }
    return schema


SCHEMAS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "report.schema.json": _report,
    "bench.schema.json": lambda: _measured(BenchResult),
    "servers.schema.json": lambda: _measured(ServersResult),
    "points.schema.json": lambda: Points.model_json_schema(mode="serialization"),
}


def schema_text(name: str) -> str:
    """Of report.json, of bench.json, of what `bench --server` writes, or of what `compare` and sweeps write."""
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **SCHEMAS[name]()}, indent=1) + "\n"


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in SCHEMAS:
        (folder / name).write_text(schema_text(name), "utf-8")


if __name__ == "__main__":
    main()
