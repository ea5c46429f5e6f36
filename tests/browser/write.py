"""Pages for the browser tests: the embedded demo's report, a comparison and a frontier, made by the command line.

python tests/browser/write.py FOLDER
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

PROGRAM = (sys.executable, "-m", "sspcompile.cli.main")
COMMANDS = (
    ("build", "--scenario", "chemistry-helpdesk", "--out", "artifacts/desk"),
    (
        "build",
        "--scenario",
        "A helpdesk <script>alert(1)</script> for chemistry",
        "--layout",
        "uniform",
        "--out",
        "artifacts/uniform",
    ),
    ("bench", "desk", "uniform", "--quick"),
    ("bench", "desk", "--quick"),
    ("compare", "desk", "uniform", "--out", "side"),
    (
        "build",
        "--scenario",
        "chemistry-helpdesk",
        "--sweep",
        "keep=0.25:1:0.25",
        "--layout",
        "per-layer",
        "--out",
        "artifacts/sweep",
    ),
)
PAGES = {
    "report.html": "artifacts/desk/report.html",
    "uniform.html": "artifacts/uniform/report.html",
    "comparison.html": "side/comparison.html",
    "frontier.html": "artifacts/sweep/frontier/frontier.html",
}


def main(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for command in COMMANDS:
        subprocess.run([*PROGRAM, *command], cwd=folder, check=True, stdout=subprocess.DEVNULL, env=os.environ)
    for name, page in PAGES.items():
        shutil.copyfile(folder / page, folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
