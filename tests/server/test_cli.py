"""The console command sets how long OpenMP's workers spin, before torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from server.cli import SPIN_COUNT

CODE = """
import os, sys
from server.cli import main
assert "torch" not in sys.modules
sys.argv = ["trimtab", "--version"]
try:
    main()
except SystemExit:
    pass
print(os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, SPIN_COUNT), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_workers_spin_briefly_unless_the_environment_says_otherwise(given: dict[str, str], spins: str) -> None:
    rest = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env={**rest, **given}, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == spins
