"""Ctrl-C at every stage of `trimtab fit`: its exit code, the files it leaves, and the next run."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
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
RUN = (
    "import sys; from server.cli import main; "
    f"tell = lambda: sys.stderr.write({LOADING!r} + chr(10)); "
    "sys.addaudithook(lambda event, about: tell() if event == 'import' and about[0] == 'torch' else None); "
    "main()"
)
SAVING = (  # the last write before a profile file is replaced
    "import os, signal; synced = os.fsync; "
    "os.fsync = lambda file: (synced(file), os.kill(os.getpid(), signal.SIGINT)); "
    "from server.cli import main; main()"
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

    def run(self, *, code: str = RUN, interrupt_at: str = "") -> tuple[int, str]:
        """Returns the exit code and stderr. Ctrl-C is sent once stderr matches `interrupt_at`."""
        master, slave = pty.openpty()
        environment = {"TRIMTAB_CACHE": str(self.cache), "TERM": "xterm", "NO_COLOR": "1", "COLUMNS": "120"}
        process = subprocess.Popen(
            [sys.executable, "-c", code, *self.command],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=slave, cwd=ROOT,
            env={**os.environ, **environment}, start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        said, sent = "", not interrupt_at
        while part := _read(master):
            said += CONTROL.sub("", part)
            if not sent and re.search(interrupt_at, said):
                process.send_signal(signal.SIGINT)
                sent = True
        os.close(master)
        assert sent, said
        return process.wait(), said

    def left(self) -> list[str]:
        return sorted(path.name for path in self.out.iterdir()) if self.out.exists() else []


def _read(terminal: int) -> str:
    try:
        return os.read(terminal, 65536).decode(errors="replace")
    except OSError:  # Linux reports a closed other end this way
        return ""


@pytest.fixture(scope="module", autouse=True)
def _few_texts() -> None:
    """As many texts as in a process of its own, whose profile is compared with one that is fitted here."""


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
    stages = {
        f"{LOADING}\\s": RUN,
        "reading activations": RUN,
        r"tune scit\D*[1-9]\d*/32": RUN,
        "calibrating": RUN,
        "": SAVING,
    }
    for stage, code in stages.items():
        status, said = fit.run(code=code, interrupt_at=stage)
        assert status == 130, (stage, said)
        assert said.splitlines()[-1] == STOPPED, (stage, said)
        assert "Traceback" not in said
        assert fit.left() == [], stage
        if "tune" in stage:
            (checkpoint,) = fit.cache.rglob("*.*")
            assert checkpoint.name == "scit.safetensors"
    assert fit.run()[0] == 0
    unbroken = replace(fit, cache=tmp_path / "cache", out=tmp_path / "profiles")
    result = CliRunner().invoke(app, unbroken.command, env={"TRIMTAB_CACHE": str(unbroken.cache)})
    assert result.exit_code == 0, result.output
    assert fit.left() == unbroken.left() == ["kind.safetensors"]
    assert _bytes(fit.out, tmp_path / "one") == _bytes(unbroken.out, tmp_path / "other")


def _bytes(directory: Path, again: Path) -> bytes:
    """The bytes of the file, stored again with a fixed creation time."""
    profile = replace(load_profile(directory / "kind.safetensors"), created_at="now")
    return save_profile(profile, again).read_bytes()
