"""A queue with its folders and workers, on both databases."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from server.feedback.database import Database
from server.jobs import job_queries
from server.jobs.job import Job, ServedModel, State, new_id
from server.jobs.job_folders import JobFolders
from server.jobs.job_queue import JobQueue
from server.jobs.worker import WorkerSettings, written
from server.profiles.audit import Author
from tests.server.feedback.conftest import *  # noqa: F403 (its fixtures)
from tests.support import job_functions
from tests.support.serving import until

PATIENCE = 240.0  # for machines that are busy


class Desk:
    """What a server does for its jobs, without a server: it takes orders and keeps workers."""

    def __init__(self, database: Database, directory: Path) -> None:
        self.database = database
        url = database.url.render_as_string(hide_password=False)
        self.profiles = directory / "profiles"
        self.folders = JobFolders(directory / "jobs")
        self.name = self.folders.open()
        self.queue = JobQueue(database.url, self.name)
        self.settings = WorkerSettings(
            url, str(self.profiles), str(self.folders.root), self.name, ServedModel("demo"), log_level="warning"
        )
        self._environment = {**os.environ, "TMPDIR": str(directory)}  # where a machine's places are
        self.workers: list[subprocess.Popen[bytes]] = []

    def order(self, kind: str, *, send: bool = True, data: Any = None, **options: Any) -> str:
        job = Job(0, new_id(), kind, "warm", "queued", options, data or {}, {}, Author("team"), time.time())
        self.folders.create(job.id, None, None)
        with self.database.writing() as connection:
            job_queries.add(connection, job, self.name)
        if send:
            self.queue.put(job.id)
        return job.id

    def get(self, job: str) -> Job:
        with self.database.reading() as connection:
            found = job_queries.get(connection, self.name, job)
        assert found is not None
        return found

    def state(self, job: str) -> State:
        return self.get(job).state

    def work(self) -> subprocess.Popen[bytes]:
        """Start a worker."""
        command = [sys.executable, "-m", "tests.support.job_worker"]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, env=self._environment, start_new_session=True)
        assert worker.stdin is not None
        worker.stdin.write(written(self.settings))
        worker.stdin.flush()
        self.workers.append(worker)
        return worker

    def steps(self, job: str) -> list[list[int]]:
        """The numbers, processes and priorities of the steps that a job has taken."""
        path = self.folders.path(job) / job_functions.STEPS
        lines = path.read_text().splitlines() if path.exists() else []
        return [[int(word) for word in line.split()] for line in lines if line.count(" ") == 2]

    def close(self) -> None:
        for worker in self.workers:
            assert worker.stdin is not None
            worker.stdin.close()
            worker.wait(PATIENCE)
        self.queue.close()


@pytest.fixture
def desk(database: Database, tmp_path: Path) -> Iterator[Desk]:
    made = Desk(database, tmp_path)
    yield made
    made.close()


def wait(condition: Callable[[], bool]) -> None:
    until(condition, within=PATIENCE)
