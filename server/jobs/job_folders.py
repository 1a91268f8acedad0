"""The folders of jobs, and the locks that say which jobs are being worked on.

    .trimtab/jobs/queue              the name of this queue; a database can hold several
    .trimtab/jobs/ID/log.txt         what the job's process printed
    .trimtab/jobs/ID/pairs.jsonl     data that came with the request, or feedback.jsonl; removed when the job ends
    .trimtab/jobs/ID/base.safetensors    the version of the profile that the job works on
    .trimtab/jobs/ID/NAME.safetensors    the profile that it made
    .trimtab/jobs/ID/lock            held by whoever works on the job

The locks are those of the kernel (flock): a process that dies gives its locks back, and nothing has to be guessed from
clocks. A child holds the lock of its job together with the worker, so a job whose lock is free has no process.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from steering_vectors.profiles.durable import write_whole

LOG = "log.txt"
PAIRS = "pairs.jsonl"
FEEDBACK = "feedback.jsonl"
BASE = "base.safetensors"
PRIVATE = 0o700
MAX_LOG_BYTES = 2**20  # that are shown, of the end


class JobFolders:
    """The folders below one directory. Called in threads. It loads no torch, and so knows nothing of profiles."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def open(self) -> str:
        """Make the directory; returns the queue's name. Raises OSError."""
        self.root.mkdir(parents=True, exist_ok=True)
        self.root.chmod(PRIVATE)
        with locked(self.root / "lock") as descriptor:
            assert descriptor is not None
            file = self.root / "queue"
            with suppress(FileNotFoundError):
                return file.read_text(encoding="ascii").strip()
            name = secrets.token_hex(12)
            write_whole(file, name.encode())
            return name

    def path(self, job: str) -> Path:
        return self.root / job

    def create(self, job: str, pairs: Iterable[Mapping[str, Any]] | None, base: bytes | None) -> None:
        """Make a job's folder, with what came with its request. Raises OSError."""
        folder = self.path(job)
        folder.mkdir(mode=PRIVATE)
        if pairs is not None:
            write_rows(folder / PAIRS, pairs)
        if base is not None:
            write_whole(folder / BASE, base)

    def remove(self, job: str) -> None:
        shutil.rmtree(self.path(job), ignore_errors=True)

    def remove_data(self, job: str) -> None:
        """Remove what a job has read, which nobody needs once its work is done: also copies of people's texts."""
        for name in (PAIRS, FEEDBACK, BASE):
            (self.path(job) / name).unlink(missing_ok=True)

    def log(self, job: str) -> str:
        """The end of a job's log; empty if it has none."""
        try:
            with (self.path(job) / LOG).open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - MAX_LOG_BYTES))
                return file.read().decode("utf-8", errors="replace")
        except FileNotFoundError:
            return ""

    def names(self, older_than: float) -> list[str]:
        """The folders of jobs that are older than so many seconds."""
        last = time.time() - older_than
        with os.scandir(self.root) as found:
            return [one.name for one in found if one.is_dir() and one.stat().st_mtime < last]

    def lock(self, job: str) -> int | None:
        """The descriptor of a job's lock, which `os.close` gives back; None if somebody else works on it, or if the job
        was deleted."""
        try:
            return _locked(self.path(job) / "lock", wait=False)
        except FileNotFoundError:
            return None


@contextmanager
def locked(path: Path) -> Iterator[int | None]:
    """Hold the lock of a file, once it is free. Raises OSError."""
    descriptor = _locked(path, wait=True)
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def machine_slot(count: int) -> int | None:
    """A descriptor that holds one of this machine's places for a job, of which this user's servers share so many; None
    if all are taken. Raises OSError."""
    folder = Path(tempfile.gettempdir()) / f"trimtab-jobs-{os.getuid()}"
    folder.mkdir(mode=PRIVATE, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to somebody else: set TMPDIR to a directory of this user")
    for number in range(count):
        if (descriptor := _locked(folder / f"slot-{number}", wait=False)) is not None:
            return descriptor
    return None


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines, whole or not at all. Raises OSError."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _locked(path: Path, *, wait: bool) -> int | None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
