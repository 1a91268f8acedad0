"""Pages that a script writes are up to date: docs/cli.md, docs/settings.md, and the table of metrics in
docs/observability.md."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("script", ["cli_docs", "metrics_docs", "settings_docs"])
def test_the_page_is_up_to_date(script: str) -> None:
    command = [sys.executable, f"scripts/{script}.py", "--check"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
