"""A PostgreSQL of its own for tests: a cluster in a temporary directory, reached by a unix socket only."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

_names = count()


def binaries() -> Path | None:
    """The directory of `initdb` and `postgres`, the newest one; None if there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return None if on_path is None else Path(on_path).resolve().parent


class Cluster:
    """A running PostgreSQL."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def url(self, database: str) -> str:
        return f"postgresql://trimtab@/{database}?host={self._directory}"

    def new_database(self) -> str:
        """The URL of a new, empty database."""
        import psycopg

        name = f"feedback_{next(_names)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")  # type: ignore[call-overload]
        return self.url(name)


@contextmanager
def postgres_cluster(bin_directory: Path) -> Iterator[Cluster]:
    """Run PostgreSQL, as another user if this one is root, whom it refuses."""
    import psycopg

    directory = Path(tempfile.mkdtemp(prefix="trimtab-pg-", dir="/tmp"))  # short: it is part of the socket's path
    identity: dict[str, Any] = {}
    if os.geteuid() == 0:
        other = pwd.getpwnam("nobody")
        os.chown(directory, other.pw_uid, other.pw_gid)
        identity = {"user": other.pw_uid, "group": other.pw_gid, "extra_groups": []}
    data = directory / "data"
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": directory, **identity}
    make = [
        bin_directory / "initdb",
        "-D",
        data,
        "-A",
        "trust",
        "-U",
        "trimtab",
        "--no-sync",
        "--locale",
        "C",
        "-E",
        "UTF8",
    ]
    subprocess.run(make, check=True, **quiet)
    run = [bin_directory / "postgres", "-D", data, "-k", directory, "-h", "", "-F"]
    server = subprocess.Popen(run, **quiet)
    try:
        cluster = Cluster(directory)
        for _ in range(300):
            try:
                psycopg.connect(cluster.url("postgres")).close()
                break
            except psycopg.OperationalError:
                assert server.poll() is None, "PostgreSQL ended"
                time.sleep(0.1)
        yield cluster
    finally:
        server.send_signal(signal.SIGQUIT)
        server.wait(30)
        shutil.rmtree(directory, ignore_errors=True)
