"""What a run says of how far it is: one line on a terminal, one a minute elsewhere."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

from sspcompile.cli.progress import stages

CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
PROGRAM = """
import time
from sspcompile.cli.progress import stages
with stages({quiet}, libraries=False) as report:
    for stage, total in (("features", 10), ("fisher-rounds", 40), ("cutting", 123456789)):
        report(stage, 0, total)
        report(stage, total // 2, total)
        time.sleep(0.6)
"""


def on_terminal(*, quiet: bool) -> str:
    """What the program writes to a terminal of 120 columns."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "30"}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(quiet=quiet)], env=environment, stderr=theirs, stdin=theirs
    ) as process:
        os.close(theirs)
        written = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            written += part
    os.close(ours)
    assert process.returncode == 0, written
    return written.decode()


def test_a_terminal_shows_one_line_with_steps_times_and_memory():
    written = on_terminal(quiet=False)
    plain = [line.strip() for line in re.split(r"[\r\n]+", CODES.sub("", written)) if line.strip()]
    for stage, steps in (("features", "5/10"), ("fisher-rounds", "20/40"), ("cutting", "50%")):
        line = next(line for line in plain if line.startswith(stage) and steps in line)
        assert re.fullmatch(rf"{stage} \S+ {steps} \d:\d\d:\d\d gone, \S+ left, [\d.]+ [MG]i?B in memory", line), line
    assert not re.search(r"\n.*[a-z]", CODES.sub("", written)), "it stays one line"
    assert len(plain) < 4 * 2.5 + 10, "few updates a second"


@pytest.mark.parametrize("quiet", [True, False])
def test_elsewhere_nothing_is_written_within_a_minute(quiet):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(quiet=quiet)], capture_output=True, text=True, check=True
    )
    assert done.stdout == done.stderr == ""


@pytest.mark.parametrize("quiet", [True, False])
def test_a_log_gets_a_line_a_minute_with_what_is_done_and_left(quiet, monkeypatch, capsys):
    """Standard error is no terminal under a scheduler, nohup or CI; an hour of silence looks like a run that hangs."""
    clock = iter((0, 0, 10, 70, 90, 100, 131, 200))
    monkeypatch.setattr("sspcompile.cli.progress.time.monotonic", lambda: float(next(clock)))
    with stages(quiet, libraries=False) as report:
        if not quiet:
            next(clock)
            for done in (4, 6, 7, 8):  # the first four are of an earlier run
                report("head scores", done, 16)
            report("cutting", 0, 123456789)
            report("cutting", 100000000, 123456789)
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.splitlines() == (
        []
        if quiet
        else [
            "head scores: 6/16, 1 min gone, about 5 min left of this stage",
            "cutting: 0%, 2 min gone",
            "cutting: 81%, 3 min gone, about 0 min left of this stage",
        ]
    )


def test_a_quiet_run_writes_nothing_to_a_terminal():
    assert on_terminal(quiet=True) == ""
