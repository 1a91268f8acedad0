"""Generations and feedback for tests of the feedback database, and short ways to store and to list them."""

from __future__ import annotations

from typing import Any

from sqlalchemy import func, select

from server.feedback import adding, queries
from server.feedback.database import Database
from server.feedback.items import Added, Answer, Filter, Item, Kept, Stored, Subject, Submission, Who

MINE = Who("t", "key", False)
ALL = Filter()


def kept(name: str, *, tenant: str = "t", user: str | None = None, created: float = 100.0, **fields: Any) -> Kept:
    data: Answer = {"prompt": "Bread is", "text": f"text of {name}", "generation": name, "created": created, **fields}
    return Kept(name, fields.get("choice", 0), Who(tenant, "key", False), user, data)


def thumb(generation: str, *, user: str | None = None, key: str | None = None) -> Item:
    return Item("thumb", {"thumb": "up"}, (Subject("answer", generation),), None, user, key)


def comment(text: str, *, user: str | None = None, key: str | None = None) -> Item:
    return Item("comment", {"comment": text}, (Subject("answer", text="A text."),), "Bread is", user, key)


def store(database: Database, *generations: Kept) -> None:
    with database.writing() as connection:
        assert adding.keep(connection, generations) == [True] * len(generations)


def add(database: Database, *items: Item, who: Who = MINE, now: float = 200.0) -> list[Added]:
    """What is answered to a request of these items. Raises its error."""
    with database.writing() as connection:
        ((added, error),) = adding.add(connection, [Submission(items, who, now)])
    if error is not None:
        raise error
    found: list[Added] = added
    return found


def listed(database: Database, wanted: Filter = ALL) -> list[Stored]:
    with database.reading() as connection:
        return list(queries.everything(connection, wanted))


def rows(database: Database, table: Any) -> int:
    with database.reading() as connection:
        return int(connection.execute(select(func.count()).select_from(table)).scalar_one())
