"""Which jobs wait, and the threads that take them: huey, over the feedback database.

huey is the one maintained queue that runs on SQLite and on PostgreSQL alike, with the same code and without a package
of its own (docs/jobs.md compares it with others). It does not promise that a task whose process is killed comes back.
So the table of jobs says what a job's state is, and a task is only the message that one may begin: a lost one is sent
again, and a second one for the same job does nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from huey import Huey, PostgresHuey, SqliteHuey
from huey.consumer import Consumer
from huey.exceptions import HueyException
from huey.registry import Message
from huey.serializer import Serializer
from sqlalchemy.engine import URL

from server.feedback.database import BUSY_SECONDS

POLL_SECONDS = 1.0  # on SQLite; PostgreSQL notifies
TASK = "job"
MODULE = "trimtab"  # of tasks' names, wherever this file moves


class JsonMessages(Serializer):  # type: ignore[misc]
    """Tasks as JSON. huey's own are pickles: whoever can write to the database could run code in the worker."""

    def _serialize(self, data: Message) -> bytes:
        return json.dumps({"id": data.id, "name": data.name, "args": data.args}).encode()

    def _deserialize(self, data: bytes) -> Message:
        found = json.loads(bytes(data))
        return Message(str(found["id"]), str(found["name"]), args=tuple(found["args"]), kwargs={}, retries=0)


class JobQueue:
    """The queue of one name. `work` gets the id of each job that may begin; who only sends leaves it out."""

    def __init__(self, url: URL, name: str, work: Callable[[str], None] | None = None) -> None:
        """Connects, and makes huey's tables. Raises the driver's errors."""
        self._huey = _huey(url, name)
        self._task = self._huey.task(name=TASK)(_of_module(work or _nothing))
        self._huey.on_shutdown(name="close")(self.close)  # in each thread of a consumer, which has a connection

    def put(self, job: str) -> None:
        """Send a job to whoever takes it first."""
        self._huey.enqueue(self._task.s(job))

    def waiting(self) -> set[str]:
        """The jobs that were sent, and that nobody has taken yet."""
        found = set()
        for data in self._huey.storage.enqueued_items():
            with suppress(ValueError, TypeError, LookupError, HueyException):  # it is no message of ours
                found.add(str(self._huey.deserialize_task(data).args[0]))
        return found

    def consumer(self, threads: int) -> Consumer:
        """What takes jobs, so many at once, in threads. Its `run` returns after SIGTERM or `stop`."""
        return self._huey.create_consumer(
            workers=threads, worker_type="thread", periodic=False, max_delay=POLL_SECONDS, scheduler_interval=60
        )

    def close(self) -> None:
        self._huey.storage.close()


def _huey(url: URL, name: str) -> Huey:
    options: dict[str, Any] = {"results": False, "serializer": JsonMessages()}
    if url.get_backend_name() == "sqlite":
        return SqliteHuey(name, filename=url.database, timeout=BUSY_SECONDS, fsync=True, **options)
    dsn = url.set(drivername="postgresql").render_as_string(hide_password=False)
    return PostgresHuey(name, dsn=dsn, table_prefix="huey", **options)


def _nothing(job: str) -> None:
    raise AssertionError(f"{job} was taken by a process that only sends")


def _of_module(work: Callable[[str], None]) -> Callable[[str], None]:
    """A plain function for huey, which names tasks after module and name."""

    def task(job: str) -> None:
        work(job)

    task.__module__ = MODULE
    return task
