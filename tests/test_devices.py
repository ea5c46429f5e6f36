"""What reads weights and hidden states gives the same numbers where they lie on other devices than the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

COMPUTED = Path(__file__).parent / "devices.py"


@pytest.fixture(scope="module")
def computed():
    done = subprocess.run([sys.executable, str(COMPUTED)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("arrangement", ["spread", "single"])
def test_every_score_and_repair_is_the_same_on_devices_that_do_not_mix(computed, arrangement):
    found = computed[arrangement]
    assert len(found) > 25 and not {name: said for name, said in found.items() if said is not None}
