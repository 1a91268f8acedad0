"""What is written is what is read, on both databases."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import func, select

from server.engines.errors import UnknownGeneration
from server.feedback import queries, tables
from server.feedback.database import Database
from server.feedback.items import (
    Added,
    Answer,
    Deleted,
    FeedbackError,
    Filter,
    IdempotencyConflict,
    Item,
    Kept,
    Subject,
    UserDeleted,
    Who,
)

pytestmark = pytest.mark.slow

ODD = "NUL \0, \U0001f35e, ' \" \\ % ; \u2028"
MINE = Who("t", "key", False)
ALL = Filter()


def kept(name: str, *, tenant: str = "t", user: str | None = None, created: float = 100.0, **fields: Any) -> Kept:
    data: Answer = {"prompt": "Bread is", "text": f"text of {name}", "generation": name, "created": created, **fields}
    return Kept(name, fields.get("choice", 0), Who(tenant, "key", False), user, data)


def thumb(generation: str, *, user: str | None = None, key: str | None = None) -> Item:
    return Item("thumb", {"thumb": "up"}, (Subject("answer", generation),), None, user, key)


def store(database: Database, *kept_: Kept) -> None:
    with database.writing() as connection:
        assert [queries.keep(connection, one) for one in kept_] == [True] * len(kept_)


def add(database: Database, *items: Item, who: Who = MINE, now: float = 200.0) -> list[Added]:
    with database.writing() as connection:
        return queries.add(connection, items, who, now)


def listed(database: Database, wanted: Filter = ALL) -> list[Any]:
    with database.reading() as connection:
        return list(queries.everything(connection, wanted))


def rows(database: Database, table: Any) -> int:
    with database.reading() as connection:
        return int(connection.execute(select(func.count()).select_from(table)).scalar_one())


def test_every_character_comes_back(database: Database) -> None:
    messages = [{"role": "user", "content": ODD}]
    item = Item("comment", {"comment": ODD}, (Subject("answer", text=ODD),), messages, "us\u00e9r", None)
    (added,) = add(database, item)
    (one,) = listed(database)
    assert (one.id, one.created, one.tenant, one.key, one.user) == (added.id, 200.0, "t", "key", "us\u00e9r")
    assert (one.value, one.answers) == ({"comment": ODD}, [{"prompt": messages, "text": ODD}])


def test_a_vote_keeps_a_copy_that_outlives_the_generation(database: Database) -> None:
    steering = [{"name": "warm", "version": "ab" * 32, "strength": 0.5}]
    store(database, kept("gen-1", steering=steering), kept("gen-2"))
    add(database, thumb("gen-1"))
    with database.writing() as connection:
        assert queries.prune(connection, generations_before=150, feedback_before=None) == Deleted(generations=2)
    (one,) = listed(database)
    assert one.answers[0]["text"] == "text of gen-1"
    with pytest.raises(UnknownGeneration):
        add(database, thumb("gen-1"))
    assert [found.id for found in listed(database, Filter(profile="warm"))] == [one.id]
    assert [found.id for found in listed(database, Filter(profile="warm#abab"))] == [one.id]
    assert listed(database, Filter(profile="warm#ba")) == []
    with database.writing() as connection:
        assert queries.prune(connection, generations_before=None, feedback_before=201) == Deleted(feedback=1)
    assert [rows(database, table) for table in tables.metadata.tables.values()] == [0] * 5


def test_others_generations_do_not_exist_but_for_an_admin(database: Database) -> None:
    store(database, kept("gen-1", tenant="other"))
    with pytest.raises(UnknownGeneration) as raised:
        add(database, thumb("gen-1"))
    assert raised.value.param == "answer.generation"
    assert len(add(database, thumb("gen-1"), who=Who("admin", "key", True))) == 1


def test_a_refused_one_of_many_stores_none(database: Database) -> None:
    store(database, kept("gen-1"))
    with pytest.raises(UnknownGeneration):
        add(database, thumb("gen-1"), thumb("gen-none"))
    assert listed(database) == []


def test_an_idempotency_key_counts_once_for_each_tenant(database: Database) -> None:
    store(database, kept("gen-1"), kept("gen-2"))
    first, again, other = add(database, thumb("gen-1", key="k"), thumb("gen-1", key="k"), thumb("gen-1", key="l"))
    assert again == Added(first.id, first.created, replayed=True)
    assert other.id != first.id
    with pytest.raises(IdempotencyConflict):
        add(database, thumb("gen-2", key="k"))
    (of_another,) = add(database, thumb("gen-1", key="k"), who=Who("admin", "admin", True))
    assert not of_another.replayed
    assert len(listed(database)) == 3


def test_a_replay_needs_no_generation_any_more(database: Database) -> None:
    store(database, kept("gen-1"))
    (first,) = add(database, thumb("gen-1", key="k"))
    with database.writing() as connection:
        queries.prune(connection, generations_before=150, feedback_before=None)
    assert add(database, thumb("gen-1", key="k"), now=300.0) == [Added(first.id, 200.0, replayed=True)]


def test_deleting_a_user_takes_all_that_is_theirs(database: Database) -> None:
    store(
        database,
        kept("gen-anna", user="anna"),
        kept("gen-nobody"),
        kept("gen-ben", user="ben"),
        kept("gen-other"),
    )
    add(database, thumb("gen-nobody", user="anna", key="k"), thumb("gen-anna", user="ben"))
    add(database, thumb("gen-ben", user="ben"), thumb("gen-ben", user="anna"), thumb("gen-other"))
    with database.writing() as connection:
        assert queries.delete_user(connection, "carl", 1.0) is None
        assert queries.delete_user(connection, "anna", 1.0) == Deleted(2, 1, 2)
        assert queries.delete_user(connection, "anna", 2.0) == Deleted(0, 0, 0)
        assert not queries.keep(connection, kept("gen-new", user="anna"))
    left = [(one.user, one.answers[0]["generation"]) for one in listed(database)]
    assert left == [("ben", "gen-ben"), (None, "gen-other")]
    assert rows(database, tables.answers) == 2
    with pytest.raises(UserDeleted):
        add(database, thumb("gen-nobody", user="anna", key="k"))


def test_a_choice_of_an_answer_must_be_named(database: Database) -> None:
    store(database, kept("gen-1", answer_id="cmpl-1", choice=0), kept("gen-2", answer_id="cmpl-1", choice=1))
    with pytest.raises(FeedbackError, match="has several choices"):
        add(database, thumb("cmpl-1"))
    item = Item("thumb", {"thumb": "up"}, (Subject("answer", "cmpl-1", 1),))
    add(database, item)
    assert listed(database)[0].answers[0]["generation"] == "gen-2"
    with pytest.raises(UnknownGeneration):
        add(database, Item("thumb", {"thumb": "up"}, (Subject("answer", "cmpl-1", 2),)))


def test_pages_are_in_the_order_of_storing(database: Database) -> None:
    items = [Item("thumb", {"thumb": "up"}, (Subject("answer", text=f"{n}"),), "p", f"u{n % 2}") for n in range(7)]
    add(database, *items)
    with database.reading() as connection:
        first = queries.page(connection, Filter(user="u0"), limit=2)
        rest = queries.page(connection, Filter(user="u0"), after=first[-1].seq)
        assert queries.count(connection, Filter(user="u0")) == 4
    assert [one.answers[0]["text"] for one in [*first, *rest]] == ["0", "2", "4", "6"]
