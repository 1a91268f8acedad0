"""schemathesis as a process, with the settings of this folder; seeds and lengths are its caller's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SMALL = ("--context", "64", "--slots", "4", "--max-queue", "8")  # of a server: bounds what one request can ask for


def run(url: str, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Check a server against its own document; what it leaves behind is left in `folder`."""
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        "--config-file",
        str(HERE / "schemathesis.toml"),
        "run",
        f"{url}/openapi.json",
        "--no-color",
        *flags,
    ]
    environment = {**os.environ, "SCHEMATHESIS_HOOK_FILE": str(HERE / "known_names.py")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
