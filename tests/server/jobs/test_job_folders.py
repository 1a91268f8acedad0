"""Folders of jobs, and locks that last as long as a process."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from server.jobs.job_folders import BASE, LOG, MAX_LOG_BYTES, PAIRS, JobFolders, machine_slot

HOLD = "import time; print('ready', flush=True); time.sleep(60)"


def test_a_queue_keeps_its_name(tmp_path: Path) -> None:
    first, second = JobFolders(tmp_path / "jobs"), JobFolders(tmp_path / "jobs")
    assert first.open() == second.open()
    assert first.open() != JobFolders(tmp_path / "others").open()
    assert stat.S_IMODE(first.root.stat().st_mode) == 0o700


def test_texts_are_removed_and_logs_kept(tmp_path: Path) -> None:
    folders = JobFolders(tmp_path)
    folders.open()
    folders.create("job-1", [{"prompt": "Brot", "chosen": "gut\u2028", "rejected": "hart"}], b"base")
    folder = folders.path("job-1")
    assert (folder / PAIRS).read_text(encoding="utf-8").count("\n") == 1
    assert (folder / BASE).read_bytes() == b"base"
    assert folders.log("job-1") == ""
    (folder / LOG).write_bytes(b"a" * MAX_LOG_BYTES + b"the end \xff")
    assert folders.log("job-1").endswith("athe end �")
    assert len(folders.log("job-1")) == MAX_LOG_BYTES
    folders.remove_data("job-1")
    assert not (folder / PAIRS).exists()
    assert not (folder / BASE).exists()
    assert (folder / LOG).exists()
    assert folders.names(-60) == ["job-1"]
    assert folders.names(60) == []
    folders.remove("job-1")
    assert not folder.exists()
    assert folders.lock("job-1") is None


def test_a_lock_lasts_as_long_as_whoever_holds_it(tmp_path: Path) -> None:
    folders = JobFolders(tmp_path)
    folders.open()
    folders.create("job-1", None, None)
    held = folders.lock("job-1")
    assert held is not None
    assert folders.lock("job-1") is None
    child = subprocess.Popen([sys.executable, "-c", HOLD], pass_fds=[held], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    os.close(held)
    assert folders.lock("job-1") is None  # the child's
    child.kill()
    child.wait()
    child.stdout.close()
    again = folders.lock("job-1")
    assert again is not None
    os.close(again)


def test_a_machine_has_so_many_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    first, second = machine_slot(2), machine_slot(2)
    assert first is not None
    assert second is not None
    assert machine_slot(2) is None
    os.close(first)
    third = machine_slot(2)
    assert third is not None
    for slot in (second, third):
        os.close(slot)


def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"trimtab-jobs-{os.getuid()}").symlink_to(tmp_path / "theirs")
    with pytest.raises(PermissionError, match="belongs to somebody else: set TMPDIR"):
        machine_slot(1)
