"""Feedback is listed by filters and pages, and deleted with its answers, on both databases."""

from __future__ import annotations

import pytest

from server.engines.errors import UnknownGeneration
from server.feedback import adding, queries, tables
from server.feedback.database import Database
from server.feedback.items import Deleted, Filter, Item, Subject, UserDeleted
from tests.support.feedback_rows import add, kept, listed, rows, store, thumb

pytestmark = pytest.mark.slow


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
    assert not any(rows(database, table) for table in tables.metadata.tables.values())


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
        assert not adding.keep(connection, [kept("gen-new", user="anna")])[0]
    left = [(one.user, one.answers[0]["generation"]) for one in listed(database)]
    assert left == [("ben", "gen-ben"), (None, "gen-other")]
    assert rows(database, tables.answers) == 2
    with pytest.raises(UserDeleted):
        add(database, thumb("gen-nobody", user="anna", key="k"))


def test_pages_are_in_the_order_of_storing(database: Database) -> None:
    items = [Item("thumb", {"thumb": "up"}, (Subject("answer", text=f"{n}"),), "p", f"u{n % 2}") for n in range(7)]
    add(database, *items)
    with database.reading() as connection:
        first = queries.page(connection, Filter(user="u0"), limit=2)
        rest = queries.page(connection, Filter(user="u0"), after=first[-1].seq)
        assert queries.count(connection, Filter(user="u0")) == 4
    assert [one.answers[0]["text"] for one in [*first, *rest]] == ["0", "2", "4", "6"]
