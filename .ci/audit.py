"""Known vulnerabilities of the pinned dependencies, and how many of them could be looked up.

pip-audit calls a dependency that the index has no advisories for "skipped" and a run of nothing but those a success;
here a mirror without advisories is said to be one. Exit code 1 with a finding, 0 without.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 120


def main() -> int:
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "--requirement",
        str(ROOT / "constraints.txt"),
        "--no-deps",
        "--disable-pip",
        "--format",
        "json",
        "--progress-spinner",
        "off",
    ]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
        dependencies = json.loads(found.stdout)["dependencies"]
    except (ValueError, subprocess.TimeoutExpired) as error:
        print(f"Audit: NOT DONE, the index of advisories gave no answer ({type(error).__name__})")
        return 0
    audited = [one for one in dependencies if "skip_reason" not in one]
    bad = [one for one in audited if one["vulns"]]
    for one in bad:
        ids = ", ".join(f"{v['id']} (fixed in {', '.join(v['fix_versions']) or 'no release'})" for v in one["vulns"])
        print(f"Audit: {one['name']} {one['version']}: {ids}")
    state = "" if audited else "; NOT DONE: this index has no advisories"
    print(f"Audit: {len(audited)} of {len(dependencies)} dependencies looked up, {len(bad)} with a known fault{state}")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
