"""The command line: as a program of its own, and in this process, where Python has imported everything already."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sspcompile.cli.main import main


@dataclass(frozen=True)
class Done:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def shell(home: Path, *args: object) -> Done:
    """Run the command line in `home` as a program of its own, without a terminal."""
    command = [sys.executable, "-m", "sspcompile.cli.main", *map(str, args)]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, env=os.environ, timeout=300)
    return Done(done.returncode, done.stdout, done.stderr)


def inside(home: Path, *args: object) -> Done:
    """Run the command line in `home` in this process; for fixtures that several tests share, where `run` is not."""
    out, err = io.StringIO(), io.StringIO()
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with contextlib.chdir(home), streams[0], streams[1], pytest.raises(SystemExit) as stop:
        main([*map(str, args)])
    return Done(int(stop.value.code or 0), out.getvalue(), err.getvalue())
