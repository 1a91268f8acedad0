"""Many requests are written at once, each as if it were alone, on both databases."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import event

from server.engines.errors import UnknownGeneration
from server.feedback import adding, queries
from server.feedback.database import Database
from server.feedback.items import Added, FeedbackError, IdempotencyConflict, Item, Subject, Submission, UserDeleted, Who
from tests.support.feedback_rows import MINE, add, comment, kept, listed, store, thumb

pytestmark = pytest.mark.slow

ODD = "NUL \0, \U0001f35e, ' \" \\ % ; \u2028"
OTHER = Who("other", "other", False)


def test_every_character_comes_back(database: Database) -> None:
    messages = [{"role": "user", "content": ODD}]
    item = Item("comment", {"comment": ODD}, (Subject("answer", text=ODD),), messages, "us\u00e9r", None)
    (added,) = add(database, item)
    (one,) = listed(database)
    assert (one.id, one.created, one.tenant, one.key, one.user) == (added.id, 200.0, "t", "key", "us\u00e9r")
    assert (one.value, one.answers) == ({"comment": ODD}, [{"prompt": messages, "text": ODD}])


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


def test_a_choice_of_an_answer_must_be_named(database: Database) -> None:
    store(database, kept("gen-1", answer_id="cmpl-1", choice=0), kept("gen-2", answer_id="cmpl-1", choice=1))
    with pytest.raises(FeedbackError, match="has several choices"):
        add(database, thumb("cmpl-1"))
    item = Item("thumb", {"thumb": "up"}, (Subject("answer", "cmpl-1", 1),))
    add(database, item)
    assert listed(database)[0].answers[0]["generation"] == "gen-2"
    with pytest.raises(UnknownGeneration):
        add(database, Item("thumb", {"thumb": "up"}, (Subject("answer", "cmpl-1", 2),)))


def together(database: Database, *values: Any) -> list[Any]:
    """What comes of these values in one call: a result or an error of each."""
    with database.writing() as connection:
        return [result if error is None else error for result, error in adding.store(connection, values)]


def test_each_request_of_a_group_is_stored_or_refused_alone(database: Database) -> None:
    add(database, comment("x", user="gone"), comment("before", key="b"), who=MINE, now=100.0)
    with database.writing() as connection:
        queries.delete_user(connection, "gone", 1.0)
    found = together(
        database,
        Submission((comment("first"),), MINE, 1.0),
        Submission((comment("second"), thumb("gen-none")), MINE, 2.0),
        Submission((comment("third", user="gone"),), MINE, 3.0),
        Submission((comment("fourth", key="b"),), MINE, 4.0),
        Submission((comment("before", key="b"),), MINE, 5.0),
        Submission((comment("before", key="b"),), OTHER, 6.0),
    )
    kinds = [type(one) for one in found]
    assert kinds == [list, UnknownGeneration, UserDeleted, IdempotencyConflict, list, list]
    assert [one.param for one in found[1:4]] == ["answer.generation", "user", "idempotency_key"]
    ((replayed,), (other,)) = found[4:]
    assert (replayed.created, replayed.replayed, other.replayed) == (100.0, True, False)
    assert [(one.tenant, one.value["comment"]) for one in listed(database)] == [
        ("t", "before"),
        ("t", "first"),
        ("other", "before"),
    ]


def test_a_key_counts_once_in_a_group_and_not_if_its_request_was_refused(database: Database) -> None:
    found = together(
        database,
        Submission((comment("x", key="k"), thumb("gen-none")), MINE, 1.0),
        Submission((comment("x", key="k"),), MINE, 2.0),
        Submission((comment("x", key="k"),), MINE, 3.0),
        Submission((comment("y", key="k"),), MINE, 4.0),
    )
    assert [type(one) for one in found] == [UnknownGeneration, list, list, IdempotencyConflict]
    assert found[2] == [Added(found[1][0].id, 2.0, replayed=True)]
    assert [one.created for one in listed(database)] == [2.0]


def test_a_generation_of_the_same_group_can_be_named(database: Database) -> None:
    vote = Submission((thumb("gen-1"),), MINE, 1.0)
    gone = Submission((comment("x", user="gone"),), MINE, 1.0)
    together(database, gone)
    with database.writing() as connection:
        queries.delete_user(connection, "gone", 1.0)
    found = together(database, vote, lambda: kept("gen-1"), lambda: kept("gen-2", user="gone"))
    assert [type(one) for one in found] == [list, bool, bool]
    assert found[1:] == [True, False]


def test_many_rows_are_stored_in_their_order(database: Database) -> None:
    count = 2 * adding.NAMES + 1
    store(database, *(kept(f"gen-{number}") for number in range(count)))
    items = [thumb(f"gen-{number}", user=f"u{number}", key=f"k{number}") for number in range(count)]
    added = add(database, *items)
    assert [one.id for one in listed(database)] == [one.id for one in added]
    assert [one.answers[0]["generation"] for one in listed(database)] == [f"gen-{number}" for number in range(count)]
    assert [one.replayed for one in add(database, *items)] == [True] * count


def test_a_group_takes_few_statements(database: Database) -> None:
    statements: list[str] = []
    event.listen(database.engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
    store(database, kept("gen-1", steering=[{"name": "warm", "version": "ab" * 32, "strength": 0.5}]))
    statements.clear()
    votes = [Submission((thumb("gen-1", user=f"u{n}", key=f"k{n}"),), MINE, 1.0) for n in range(50)]
    together(database, *votes)
    words = [statement.split()[0] for statement in statements if "pg_advisory" not in statement]
    assert [word for word in words if word != "BEGIN"] == ["SELECT"] * 3 + ["INSERT"] * 3


def test_a_key_speaks_for_the_tenants_that_it_names(database: Database) -> None:
    judge = Who("judge", "judge", False, frozenset({"t", "u"}))
    store(database, kept("gen-t"), kept("gen-u", tenant="u"), kept("gen-v", tenant="v"))
    sides = (Subject("a", "gen-t"), Subject("b", "gen-u"))
    assert len(add(database, thumb("gen-t"), Item("pair", {"better": "a"}, sides), who=judge)) == 2
    with pytest.raises(UnknownGeneration) as raised:
        add(database, thumb("gen-v"), who=judge)
    assert raised.value.message == (
        "there is no kept generation 'gen-v' of this key, or of those that it speaks for: it may be older than "
        "--keep-generations"
    )
    with pytest.raises(UnknownGeneration):
        add(database, thumb("gen-u"), who=MINE)
