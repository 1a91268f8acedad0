"""The queue: messages are JSON, whoever waits gets them once, and several queues share a database."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from server.feedback.database import Database
from server.jobs.job_queue import JobQueue
from tests.support.serving import until

pytestmark = pytest.mark.slow


def test_messages_wait_until_they_are_taken(database: Database) -> None:
    taken: list[str] = []
    sending, other = JobQueue(database.url, "waiting"), JobQueue(database.url, "other")
    for job in ("job-1", "job-2"):
        sending.put(job)
    assert sending.waiting() == {"job-1", "job-2"}
    assert other.waiting() == set()
    taking = JobQueue(database.url, "waiting", taken.append)
    consumer = taking.consumer(1)
    consumer.start()
    until(lambda: taken == ["job-1", "job-2"])
    consumer.stop()
    for _, thread in consumer.worker_threads:
        thread.join(5)
    assert sending.waiting() == set()
    for queue in (sending, other, taking):
        queue.close()


def test_messages_are_no_pickles(database: Database) -> None:
    """Whoever can write to the database cannot run code in the worker; what is no message is passed over."""
    queue = JobQueue(database.url, "garbage")
    table = "task" if database.is_sqlite else "huey_task"
    with database.writing() as connection:
        statement = text(f"INSERT INTO {table} (queue, data, priority) VALUES ('garbage', :data, 1)")
        for data in (b"cos\nsystem\n(S'false'\ntR.", b"{}", b'{"id": "1", "name": "os.system", "args": ["false"]}'):
            connection.execute(statement, {"data": data})
    queue.put("job-1")
    assert queue.waiting() == {"job-1"}
    taken: list[str] = []
    taking = JobQueue(database.url, "garbage", taken.append)
    consumer = taking.consumer(1)
    consumer.start()
    until(lambda: taken == ["job-1"])
    consumer.stop()
    for _, thread in consumer.worker_threads:
        thread.join(5)
    queue.close()
    taking.close()
