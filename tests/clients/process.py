"""`trimtab serve` as a process, as its users start it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STOPPING = 20.0
FLAGS = ("--port", "0", "--dtype", "float32", "--threads", "1")


@contextmanager
def serving(profiles: Path, log: Path, *flags: str) -> Iterator[str]:
    """The address of a server with the demo model in float32. At the end it must stop when told to, and must not have
    logged an error: what a client was answered as a 5xx fails the tests even if the client made light of it."""
    command = [sys.executable, "-m", "server.cli", "serve", "--profiles", str(profiles), *FLAGS, *flags]
    with (
        log.open("w", encoding="utf-8") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        try:
            yield _address(process, log)
        finally:
            process.terminate()
            code = process.wait(STOPPING)
    assert code in (0, -signal.SIGTERM), log.read_text(encoding="utf-8")
    assert " ERROR " not in (logged := log.read_text(encoding="utf-8")), logged


def _address(process: subprocess.Popen[str], log: Path) -> str:
    """What the line says that the server prints once it can serve."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("trimtab serves demo"), line + log.read_text(encoding="utf-8")
    return line.split()[-1]
