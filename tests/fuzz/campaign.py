"""Every target in turn, and a table of what was run: python tests/fuzz/campaign.py [--scale 1.0].

Writes benchmarks/results/fuzz.json and the corpus: what was there and every input that reached something new. A
finding ends with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = Path("benchmarks/results/fuzz.json")
# Executions of each target; those that parse YAML cost most.
RUNS = {
    "header": 300_000,
    "config": 200_000,
    "index": 180_000,
    "mask": 220_000,
    "manifest": 150_000,
    "prompts": 100_000,
    "recipe": 10_000,
}
SECONDS_OF_A_HANG = 20
EPOCH = (1980, 1, 1, 0, 0, 0)


def fuzz(target: str, runs: int, folder: Path) -> dict[str, Any]:
    """One target from its kept corpus, to which libFuzzer adds what reaches something new."""
    corpus, findings = folder / "corpus", HERE / "findings" / target
    for path in (corpus, findings):
        path.mkdir(parents=True, exist_ok=True)
    kept = HERE / "corpus" / f"{target}.zip"
    with zipfile.ZipFile(kept) as archive:
        archive.extractall(corpus)
    program = [sys.executable, "-P", str(HERE / "run.py"), target]
    limits = [f"-timeout={SECONDS_OF_A_HANG}", "-max_len=4096", "-rss_limit_mb=2048"]
    start = time.perf_counter()
    done = subprocess.run(
        [
            *program,
            *limits,
            f"-runs={runs}",
            f"-dict={HERE / 'words.dict'}",
            f"-artifact_prefix={findings}/",
            "-print_final_stats=1",
            str(corpus),
        ],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    took = time.perf_counter() - start
    if done.returncode:
        print(done.stderr[-4000:], flush=True)
    else:
        findings.rmdir()
        # libFuzzer's own -merge starts processes that atheris does not instrument, and would keep nothing.
        keep(corpus, kept)
    executed, covered = (re.findall(p, done.stderr) for p in (r"number_of_executed_units:\s*(\d+)", r"cov: (\d+)"))
    return {
        "target": target,
        "executions": int(executed[-1]) if executed else 0,
        "edges": int(covered[-1]) if covered else 0,
        "seconds": round(took, 1),
        "found": done.returncode != 0,
    }


def keep(folder: Path, archive: Path) -> None:
    """The same files give the same bytes."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
        for path in sorted(folder.iterdir()):
            out.writestr(zipfile.ZipInfo(path.name, EPOCH), path.read_bytes(), zipfile.ZIP_DEFLATED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="Times the usual executions.")
    scale, rows = parser.parse_args().scale, []
    for target, usual in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            rows.append(fuzz(target, max(1, int(usual * scale)), Path(folder)))
        print(rows[-1], flush=True)
    total = sum(row["executions"] for row in rows)
    print(f"{total:,} executions, {sum(row['found'] for row in rows)} findings")
    RESULTS.write_text(json.dumps({"targets": rows, "executions": total}, indent=1) + "\n")
    raise SystemExit(any(row["found"] for row in rows))


if __name__ == "__main__":
    main()
