"""Ctrl-C at every stage of `trimtab fit`: its exit code, the files it leaves, and the next run."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from steering_vectors.cli.app import STOPPED
from steering_vectors.profiles.files import load_profile, save_profile
from tests.steering_vectors.cli.conftest import app
from tests.support.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[3]
LOADING = "about to import torch"
SAVING = "interrupted at the last write before a profile file is replaced"
ENDED = "ended with "
SESSION = f"""
import os, signal, sys
import pytest
from server.cli import main
from tests.support.few_texts import few_texts

few_texts(pytest.MonkeyPatch(), short=True)
synced = os.fsync

def interrupted(file):
    synced(file)
    os.kill(os.getpid(), signal.SIGINT)

for line in sys.stdin:
    os.fsync = interrupted if line == {SAVING + chr(10)!r} else synced
    status = 0
    try:
        main()
    except SystemExit as ended:
        status = ended.code or 0
    print({ENDED!r} + str(status), file=sys.stderr, flush=True)
"""
COLD = (
    "import sys; from server.cli import main; "
    f"tell = lambda: sys.stderr.write({LOADING!r} + chr(10)); "
    "sys.addaudithook(lambda event, about: tell() if event == 'import' and about[0] == 'torch' else None); "
    "main()"
)
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Fit:
    """A command in its own process, with a terminal on stderr so that it shows progress."""

    model: Path
    data: Path
    cache: Path
    out: Path

    @property
    def command(self) -> list[str]:
        places = ["--model", self.model, "--data", self.data, "--out", self.out]
        method = ["--method", "rahf-scit", "-o", "epochs=2", "-o", "batch=4"]
        return ["fit", "kind", *map(str, places), "--layers", "1", "--text-tokens", "20", *method]

    @contextmanager
    def process(self, code: str) -> Iterator[Process]:
        master, slave = pty.openpty()
        environment = {"TRIMTAB_CACHE": str(self.cache), "TERM": "xterm", "NO_COLOR": "1", "COLUMNS": "120"}
        with subprocess.Popen(
            [sys.executable, "-c", code, *self.command],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=slave, cwd=ROOT,
            env={**os.environ, **environment}, start_new_session=True, text=True,
        ) as process:  # fmt: skip
            os.close(slave)
            yield Process(process, master)
        os.close(master)

    def left(self) -> list[str]:
        return sorted(path.name for path in self.out.iterdir()) if self.out.exists() else []


@dataclass(frozen=True)
class Process:
    """A running command, or a session of them that begins one with every line."""

    process: subprocess.Popen[str]
    terminal: int

    def run(self, interrupt_at: str = "", line: str = "") -> tuple[int, str]:
        """Begin the next command of a session, and wait for its end. Returns its exit code and what it said. Ctrl-C is
        sent once that matches `interrupt_at`."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        said = self.read(interrupt_at, until=f"{ENDED}\\d+\\s")
        said, _, status = said.rpartition(ENDED)
        return int(status), said

    def read(self, interrupt_at: str = "", until: str | None = None) -> str:
        said, sent = "", not interrupt_at
        while not (until and re.search(until, said)) and (part := _read(self.terminal)):
            said += CONTROL.sub("", part)
            if not sent and re.search(interrupt_at, said):
                self.process.send_signal(signal.SIGINT)
                sent = True
        assert sent, said
        return said


def _read(terminal: int) -> str:
    try:
        return os.read(terminal, 65536).decode(errors="replace")
    except OSError:  # Linux reports a closed other end this way
        return ""


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    place = tmp_path_factory.mktemp("interrupts")
    data = place / "data.jsonl"
    rows = [
        {"prompt": f"What of {row}?", "chosen": f"warm {row} kindly", "rejected": f"three {row} letters"}
        for row in range(40)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Fit(save_tiny("llama", place / "model"), data, place / "cache", place / "profiles")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ctrl_c_at_any_stage_and_the_next_run_continues(fit: Fit, tmp_path: Path) -> None:
    with fit.process(COLD) as cold:
        assert cold.read(f"{LOADING}\\s").splitlines()[-1] == STOPPED
    assert cold.process.returncode == 130
    with fit.process(SESSION) as session:
        for stage in ("reading activations", r"tune scit\D*[1-9]\d*/32", "calibrating", ""):
            status, said = session.run(stage, "" if stage else SAVING)
            assert status == 130, (stage, said)
            assert said.splitlines()[-1] == STOPPED, (stage, said)
            assert "Traceback" not in said
            assert fit.left() == [], stage
            if "tune" in stage:
                (checkpoint,) = fit.cache.rglob("*.*")
                assert checkpoint.name == "scit.safetensors"
        assert session.run()[0] == 0
        assert session.process.stdin is not None
        session.process.stdin.close()
    unbroken = replace(fit, cache=tmp_path / "cache", out=tmp_path / "profiles")
    result = CliRunner().invoke(app, unbroken.command, env={"TRIMTAB_CACHE": str(unbroken.cache)})
    assert result.exit_code == 0, result.output
    assert fit.left() == unbroken.left() == ["kind.safetensors"]
    assert _bytes(fit.out, tmp_path / "one") == _bytes(unbroken.out, tmp_path / "other")


def _bytes(directory: Path, again: Path) -> bytes:
    """The bytes of the file, stored again with a fixed creation time."""
    profile = replace(load_profile(directory / "kind.safetensors"), created_at="now")
    return save_profile(profile, again).read_bytes()
