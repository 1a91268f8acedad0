"""deploy/systemd/trimtab.service is a valid unit that confines the server and gives it the time it needs."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from server.cli import ENGINE_FAILED, THREAD_SECONDS
from server.http.listener import LAST_WORDS_SECONDS
from server.settings import load_settings, unknown_variables
from steering_vectors.cli.app import FAILED

SYSTEMD = Path(__file__).resolve().parents[2] / "deploy" / "systemd"
UNIT = (SYSTEMD / "trimtab.service").read_text(encoding="utf-8")
PROGRAM = "/opt/trimtab/bin/trimtab"
MAX_EXPOSURE = 20  # of 100, as `systemd-analyze security` counts; it calls this OK

analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed: apt-get install systemd"
)


def setting(name: str) -> str:
    """The only value of a directive."""
    (found,) = re.findall(rf"^{name}=(.*)$", UNIT, re.MULTILINE)
    return str(found)


def environment() -> dict[str, str]:
    """The variables that the unit sets."""
    lines = re.findall(r"^Environment=(.*)$", UNIT, re.MULTILINE)
    return dict(word.split("=", 1) for line in lines for word in line.split())


def installed(folder: Path) -> Path:
    """The unit with a program that exists, because `systemd-analyze verify` looks for it."""
    program = folder / "trimtab"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = folder / "trimtab.service"
    assert PROGRAM in UNIT
    unit.write_text(UNIT.replace(PROGRAM, str(program)))
    return unit


@analyze
def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(installed(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert [line for line in done.stderr.splitlines() if "trimtab" in line] == []
    assert done.returncode == 0


@analyze
def test_systemd_would_find_a_mistake(tmp_path: Path) -> None:
    unit = installed(tmp_path)
    unit.write_text(unit.read_text().replace("ProtectSystem=strict", "ProtectSystem=strictly"))
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "trimtab.service" in done.stderr


@analyze
def test_it_is_confined(tmp_path: Path) -> None:
    command = ["systemd-analyze", "security", "--offline=yes", f"--threshold={MAX_EXPOSURE}", "--no-pager"]
    done = subprocess.run([*command, str(installed(tmp_path))], capture_output=True, text=True, check=False)
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze does not examine files")
    assert done.returncode == 0, done.stdout[-1000:]


def test_it_runs_without_root() -> None:
    assert setting("User") == "trimtab"
    assert setting("NoNewPrivileges") == "yes"
    assert setting("CapabilityBoundingSet") == ""
    assert setting("ProtectSystem") == "strict"


def test_what_would_fail_again_is_not_started_again() -> None:
    assert setting("Restart") == "on-failure"
    assert setting("RestartPreventExitStatus").split() == [str(FAILED)]
    assert str(ENGINE_FAILED) not in setting("RestartPreventExitStatus").split()


def test_the_drain_ends_before_systemd_kills() -> None:
    drain = float(environment()["TRIMTAB_DRAIN_SECONDS"])
    assert drain + LAST_WORDS_SECONDS + THREAD_SECONDS + 3 <= float(setting("TimeoutStopSec"))
    assert setting("KillSignal") == "SIGTERM"


def test_its_variables_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = environment()
    assert unknown_variables(variables) == []
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert load_settings().profiles == Path("/var/lib/trimtab/profiles")


def test_the_example_of_settings_has_settings_only() -> None:
    lines = re.findall(r"^#?(TRIMTAB_\w+)=", (SYSTEMD / "trimtab.env").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) > 5
    assert unknown_variables(dict.fromkeys(lines, "")) == []


def test_it_writes_its_state_and_cache_only() -> None:
    state = setting("StateDirectory").split()
    assert state == ["trimtab", "trimtab/profiles"]
    assert setting("ReadOnlyPaths") == environment()["TRIMTAB_PROFILES"]
    assert environment()["HF_HOME"].startswith(f"/var/cache/{setting('CacheDirectory')}/")
    assert environment()["TRIMTAB_CACHE"] == f"/var/cache/{setting('CacheDirectory')}"
