"""`bench`: the artifact against its dense model, and the artifact's report brought up to date."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from sspcompile.checkpoint.manifest import check_manifest, write_manifest
from sspcompile.checkpoint.publish import write_atomically
from sspcompile.measure.latency import FULL, QUICK, BenchResult, Contender
from sspcompile.measure.latency import bench as measure
from sspcompile.pipeline.verifying import dense_of
from sspcompile.report.build import latency_section
from sspcompile.report.json import read_report
from sspcompile.report.write import write_report
from sspcompile.slicing.configuration import ships_code
from sspcompile.workspace import MODEL, REPORT

SAMPLES = "bench.json"


def _defaults(settings: Mapping[str, int], positions: int | None) -> dict[str, int]:
    """The default sizes, with a prompt that a model of so few positions can hold; the report states what was used."""
    chosen = dict(settings) | {"threads": os.cpu_count() or 1}
    if positions is not None:
        chosen["prompt_tokens"] = max(1, min(chosen["prompt_tokens"], positions - chosen["new_tokens"]))
    return chosen


def bench(
    folder: Path, model: str | None, *, quick: bool, sizes: Mapping[str, int | None],
    progress: Callable[[str, int, int], None],
) -> BenchResult:
    """Measure, write every sample to bench.json, and put the summary into the report. Raises like `measure.bench`."""
    # The manifest is written anew at the end: without this check a damaged file would be blessed there.
    manifest = check_manifest(folder)
    subject = dense_of(folder, manifest, model)
    custom = ships_code(folder / MODEL)
    settings = _defaults(QUICK if quick else FULL, subject.checkpoint.config.get("max_position_embeddings"))
    settings |= {name: value for name, value in sizes.items() if value is not None}
    result = measure(
        [Contender("dense", subject.checkpoint.path), Contender("sliced", folder / MODEL, trust_remote_code=custom)],
        progress=lambda done, total, _what: progress("measuring", done, total),
        **settings,
    )
    write_atomically(folder / SAMPLES, json.dumps(result.to_json(), indent=1) + "\n")
    report = read_report(folder / REPORT).model_copy(update={"latency": latency_section(result)})
    write_report(report, folder)
    write_manifest(folder, manifest.origin)
    return result
