"""The writer: what waits is bounded, what is refused leaves the others alone, a database that is away is an error."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from sqlalchemy import insert, select

from server.engines.errors import Overloaded, UnknownGeneration
from server.feedback import tables
from server.feedback.database import Database
from server.feedback.items import FeedbackError, FeedbackUnavailable, Kept, Who
from server.feedback.store import FeedbackStore
from server.feedback.writer import TOGETHER, Write, Writer
from tests.support.feedback_rows import comment, kept, listed, thumb

pytestmark = pytest.mark.slow


class Gate:
    """The transactions of a database, which a test can hold; counts them."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.open = threading.Event()
        self.reached = threading.Event()
        self.count = 0

    @contextmanager
    def writing(self) -> Iterator[Any]:
        self.reached.set()
        assert self.open.wait(20)
        self.count += 1
        with self._database.writing() as connection:
            yield connection


def note(connection: Any, name: str) -> str:
    connection.execute(insert(tables.deleted_users), {"digest": name, "deleted": 0})
    return name


def notes(database: Database) -> list[str]:
    with database.reading() as connection:
        return sorted(connection.execute(select(tables.deleted_users.c.digest)).scalars())


def test_what_waits_is_committed_together_and_what_is_refused_alone(database: Database) -> None:
    gate = Gate(database)
    writer = Writer(gate.writing)

    def refused(connection: Any) -> None:
        note(connection, "refused")
        raise FeedbackError("no")

    async def main() -> list[Any]:
        first = asyncio.create_task(writer.run(lambda connection: note(connection, "first")))
        await asyncio.to_thread(gate.reached.wait)
        works = [lambda connection: note(connection, "a"), refused, lambda connection: note(connection, "b")]
        rest = [asyncio.create_task(writer.run(work)) for work in works]
        while writer.waiting < 3:
            await asyncio.sleep(0)
        gate.open.set()
        return await asyncio.gather(first, *rest, return_exceptions=True)

    first, a, error, b = asyncio.run(main())
    writer.close()
    assert (first, a, b, type(error)) == ("first", "a", "b", FeedbackError)
    assert notes(database) == ["a", "b", "first"]
    assert gate.count == 2


def test_a_bug_in_one_write_leaves_the_others_alone(database: Database) -> None:
    writer = Writer(database.writing)

    async def main() -> list[Any]:
        return await asyncio.gather(
            writer.run(lambda connection: note(connection, "a")),
            writer.run(lambda connection: note(connection, "a")),  # not unique
            writer.run(lambda connection: {}["missing"]),
            writer.run(lambda connection: note(connection, "b")),
            return_exceptions=True,
        )

    found = asyncio.run(main())
    writer.close()
    assert [type(one).__name__ for one in found] == ["str", "IntegrityError", "KeyError", "str"]
    assert notes(database) == ["a", "b"]


def test_what_comes_within_a_short_time_is_committed_together(database: Database) -> None:
    gate = Gate(database)
    gate.open.set()
    writer = Writer(gate.writing, rest=1e9, max_rest_seconds=3600)

    async def main() -> None:
        await writer.run(lambda connection: note(connection, "first"))  # after a pause nothing waits
        names = [f"full-{number}" for number in range(TOGETHER)]
        await asyncio.gather(*(writer.run(partial(note, name=name)) for name in names))
        rest = [asyncio.create_task(writer.run(partial(note, name=name))) for name in ("a", "b")]
        while writer.waiting < 2:
            await asyncio.sleep(0)
        await asyncio.to_thread(writer.close)
        await asyncio.gather(*rest)

    asyncio.run(main())
    assert len(notes(database)) == 1 + TOGETHER + 2
    assert gate.count == 3


def test_one_of_many_that_raises_is_refused_alone(database: Database) -> None:
    """Generations and votes are written by few statements; one that cannot be built undoes none of the others."""
    gate = Gate(database)
    noted: list[str] = []
    store = FeedbackStore(
        database, keep_generations=None, keep_feedback=None, noted=noted.append, writer=Writer(gate.writing)
    )

    def broken() -> Kept:
        raise KeyError("missing")

    async def main() -> list[Any]:
        first = asyncio.create_task(store.add([comment("first")], Who()))
        await asyncio.to_thread(gate.reached.wait)
        store.keep(lambda: kept("gen-1"), 10)
        store.keep(broken, 10)
        items = [thumb("gen-1"), thumb("gen-none"), comment("last")]
        rest = [asyncio.create_task(store.add([item], Who())) for item in items]
        while store.waiting < 5:
            await asyncio.sleep(0)
        gate.open.set()
        found = await asyncio.gather(first, *rest, return_exceptions=True)
        await store.close()
        return found

    found = asyncio.run(main())
    assert [type(one) for one in found] == [list, list, UnknownGeneration, list]
    assert noted == ["kept", "failed"]
    assert [one.kind for one in listed(database)] == ["comment", "thumb", "comment"]
    assert gate.count == 3  # the first, then all, then one by one


def test_what_waits_is_bounded_by_number_and_size(database: Database) -> None:
    gate = Gate(database)
    writer = Writer(gate.writing, max_waiting=2, max_size=10)
    outcomes: list[Any] = []
    work = lambda connection, values: [(value, None) for value in values]  # noqa: E731
    write = Write(work, None, 4, lambda result, error: outcomes.append(error))
    assert writer.put(write)
    assert gate.reached.wait(20)
    large = Write(work, None, 7, lambda result, error: outcomes.append(error))
    assert [writer.put(write), writer.put(large), writer.put(write), writer.put(write)] == [True, False, True, False]
    with pytest.raises(Overloaded):
        asyncio.run(writer.run(lambda connection: None))
    gate.open.set()
    writer.close()
    assert outcomes == [None, None, None]
    assert not writer.put(write)


def test_a_full_queue_counts_generations_that_are_not_kept(database: Database) -> None:
    gate = Gate(database)
    noted: list[str] = []
    writer = Writer(gate.writing, max_waiting=1)
    store = FeedbackStore(database, keep_generations=None, keep_feedback=None, noted=noted.append, writer=writer)

    def keep(name: str) -> None:
        store.keep(lambda: kept(name), 10)

    keep("gen-1")
    assert gate.reached.wait(20)
    for name in ("gen-2", "gen-3", "gen-4"):
        keep(name)
    assert noted == ["full", "full"]
    gate.open.set()
    asyncio.run(store.close())
    assert noted == ["full", "full", "kept", "kept"]


def test_a_database_that_is_away_is_an_error_and_comes_back(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    away = True

    @contextmanager
    def writing() -> Iterator[Any]:
        with database.writing() as connection:
            yield connection
            if away:
                connection.exec_driver_sql("SELECT * FROM a_table_that_is_not_there")

    writer = Writer(writing)
    with pytest.raises(FeedbackUnavailable):
        asyncio.run(writer.run(lambda connection: note(connection, "a secret")))
    away = False
    asyncio.run(writer.run(lambda connection: note(connection, "b")))
    writer.close()
    assert notes(database) == ["b"]
    assert "the feedback database cannot be written" in caplog.text
    assert "secret" not in caplog.text


def test_retention_deletes_what_is_older_than_its_setting(database: Database) -> None:
    async def main() -> tuple[Any, Any]:
        store = FeedbackStore(database, keep_generations=50, keep_feedback=None)
        store.keep(lambda: kept("gen-1", created=100.0), 10)
        store.keep(lambda: Kept("gen-2", 0, Who(), None, {**kept("gen-2").data, "created": 120.0}), 10)
        found = await store.prune(now=160.0), await store.prune(now=171.0)
        await store.close()
        return found

    first, second = asyncio.run(main())
    assert (first.generations, second.generations) == (1, 1)
