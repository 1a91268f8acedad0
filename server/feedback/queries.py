"""What is read from and written to the feedback database, inside the caller's transaction.

Writes rely on `Database.writing`, which runs no two of them at a time: what a write has looked up does not change
before it is done.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from typing import Any, cast

from sqlalchemy import Connection, Row, Select, bindparam, delete, func, insert, or_, select

from server.engines.errors import UnknownGeneration
from server.feedback import tables
from server.feedback.items import (
    Added,
    Answer,
    Deleted,
    FeedbackError,
    Filter,
    IdempotencyConflict,
    Item,
    Kept,
    Stored,
    Subject,
    UserDeleted,
    Who,
    digest_of,
)

PAGE = 500
FEEDBACK = tables.feedback.c
GENERATIONS = tables.generations.c
ANSWERS = tables.answers.c
PROFILES = tables.profiles.c

# Made once: building a statement costs as much as running it.
INSERT_GENERATION = insert(tables.generations)
INSERT_FEEDBACK = insert(tables.feedback)
INSERT_ANSWER = insert(tables.answers)
INSERT_PROFILE = insert(tables.profiles)
OF_KEY = select(FEEDBACK.id, FEEDBACK.created, FEEDBACK.digest).where(
    FEEDBACK.tenant == bindparam("tenant"), FEEDBACK.idempotency_key == bindparam("key")
)
OF_DELETED = select(tables.deleted_users.c.digest).where(tables.deleted_users.c.digest == bindparam("digest"))


def keep(connection: Connection, generation: Kept) -> bool:
    """Store a generation. Returns False, and stores nothing, for one of a deleted user."""
    if is_deleted(connection, generation.user):
        return False
    connection.execute(
        INSERT_GENERATION,
        {
            "id": generation.id,
            "answer_id": generation.data.get("answer_id"),
            "choice": generation.choice,
            "created": generation.data["created"],
            "tenant": generation.who.tenant,
            "key_name": generation.who.key,
            "user": generation.user,
            "data": generation.data,
        },
    )
    return True


def add(connection: Connection, items: Sequence[Item], who: Who, now: float) -> list[Added]:
    """Store feedback, all of it or none. Raises FeedbackError, UnknownGeneration, IdempotencyConflict, UserDeleted."""
    return [_add(connection, item, who, now) for item in items]


def _add(connection: Connection, item: Item, who: Who, now: float) -> Added:
    if is_deleted(connection, item.user):
        message = "this user's feedback was deleted: send feedback under another id, or without one"
        raise UserDeleted(message, param=f"{item.where}user")
    digest = item.digest()
    if (before := _replayed(connection, item, who, digest)) is not None:
        return before
    found = [_answer(connection, subject, item, who) for subject in item.subjects]
    _check_sides(item, [answer for answer, _ in found])
    stored = Stored(
        0, f"fb-{secrets.token_hex(12)}", now, who.tenant, who.key, item.user, item.kind, item.value,
        item.idempotency_key, digest, [answer for answer, _ in found], [user for _, user in found],
    )  # fmt: skip
    put(connection, stored)
    return Added(stored.id, now)


def put(connection: Connection, one: Stored) -> None:
    """Write the rows of a piece of feedback."""
    result = connection.execute(
        INSERT_FEEDBACK,
        {
            "id": one.id,
            "created": one.created,
            "tenant": one.tenant,
            "key_name": one.key,
            "user": one.user,
            "kind": one.kind,
            "value": dict(one.value),
            "idempotency_key": one.idempotency_key,
            "digest": one.digest,
        },
    )
    assert result.inserted_primary_key is not None
    seq = result.inserted_primary_key[0]
    rows = [
        {"feedback": seq, "place": place, "generation": answer.get("generation"), "user": user, "data": answer}
        for place, (answer, user) in enumerate(zip(one.answers, one.users, strict=True))
    ]
    if rows:
        connection.execute(INSERT_ANSWER, rows)
    steered = [
        {"feedback": seq, "place": place, **{name: receipt[field] for name, field in OF_RECEIPT.items()}}
        for place, answer in enumerate(one.answers)
        for receipt in cast(Sequence[dict[str, Any]], answer.get("steering", ()))
    ]
    if steered:
        connection.execute(INSERT_PROFILE, steered)


OF_RECEIPT = {"profile": "name", "version": "version", "strength": "strength"}


def _replayed(connection: Connection, item: Item, who: Who, digest: str) -> Added | None:
    """What was answered to the same idempotency key before."""
    if item.idempotency_key is None:
        return None
    row = connection.execute(OF_KEY, {"tenant": who.tenant, "key": item.idempotency_key}).first()
    if row is None:
        return None
    if row.digest != digest:
        message = "this idempotency key was used for other feedback: send each feedback with a key of its own"
        raise IdempotencyConflict(message, param=f"{item.where}idempotency_key")
    return Added(row.id, row.created, replayed=True)


def _answer(connection: Connection, subject: Subject, item: Item, who: Who) -> tuple[Answer, str | None]:
    """A copy of what feedback is about, and the user who asked for it."""
    if subject.generation is None:
        assert subject.text is not None
        assert item.prompt is not None
        return {"prompt": item.prompt, "text": subject.text}, item.user
    name = subject.generation
    query = select(tables.generations).where(or_(GENERATIONS.id == name, GENERATIONS.answer_id == name))
    if not who.is_admin:
        query = query.where(GENERATIONS.tenant == who.tenant)
    rows = connection.execute(query.order_by(GENERATIONS.choice)).all()
    if not rows:
        raise UnknownGeneration(
            f"there is no kept generation {name!r} of this key: it may be older than --keep-generations",
            param=f"{subject.param}.generation",
        )
    row = _choice(rows, subject)
    return cast(Answer, row.data), row.user


def _choice(rows: Sequence[Row[Any]], subject: Subject) -> Row[Any]:
    param = f"{subject.param}.choice"
    if subject.choice is None:
        if len(rows) > 1:
            message = f"the answer {subject.generation!r} has several choices: name one, or its generation_id"
            raise FeedbackError(message, param=param)
        return rows[0]
    for row in rows:
        if row.choice == subject.choice:
            return row
    message = f"there is no kept choice {subject.choice} of {subject.generation!r}"
    raise UnknownGeneration(message, param=param)


def _check_sides(item: Item, answers: Sequence[Answer]) -> None:
    """Raise FeedbackError for two sides of which neither can be better."""
    if item.kind == "edit" and answers[0]["text"] == item.value["corrected"]:
        message = "the corrected text is the original: nothing was corrected"
        raise FeedbackError(message, param=f"{item.where}corrected", code="same_sides")
    if item.kind != "pair":
        return
    first, second = answers
    of_second = item.subjects[1].param
    if first["text"] == second["text"] or first.get("generation", 1) == second.get("generation", 2):
        raise FeedbackError(
            "both sides are the same text: nothing can be preferred", param=of_second, code="same_sides"
        )
    if first["prompt"] != second["prompt"]:
        message = "the two generations answer different prompts: compare answers to one prompt"
        raise FeedbackError(message, param=of_second, code="different_prompts")


def page(connection: Connection, wanted: Filter, *, after: int = 0, limit: int = PAGE) -> list[Stored]:
    """Feedback in the order in which it was stored, after a `seq`."""
    query = _filtered(select(tables.feedback), wanted).where(FEEDBACK.seq > after).order_by(FEEDBACK.seq).limit(limit)
    rows = connection.execute(query).all()
    answers: dict[int, list[Answer]] = {row.seq: [] for row in rows}
    users: dict[int, list[str | None]] = {row.seq: [] for row in rows}
    of_rows = select(tables.answers).where(ANSWERS.feedback.in_(answers)).order_by(ANSWERS.feedback, ANSWERS.place)
    for row in connection.execute(of_rows) if rows else ():
        answers[row.feedback].append(row.data)
        users[row.feedback].append(row.user)
    return [
        Stored(
            row.seq, row.id, row.created, row.tenant, row.key_name, row.user, row.kind, row.value,
            row.idempotency_key, row.digest, answers[row.seq], users[row.seq],
        )
        for row in rows
    ]  # fmt: skip


def everything(connection: Connection, wanted: Filter) -> Iterator[Stored]:
    """All feedback of a filter, read a page at a time."""
    after = 0
    while found := page(connection, wanted, after=after):
        yield from found
        after = found[-1].seq


def count(connection: Connection, wanted: Filter) -> int:
    return int(connection.execute(_filtered(select(func.count(FEEDBACK.seq)), wanted)).scalar_one())


def _filtered(query: Select[Any], wanted: Filter) -> Select[Any]:
    if wanted.kind is not None:
        query = query.where(FEEDBACK.kind == wanted.kind)
    if wanted.user is not None:
        query = query.where(FEEDBACK.user == wanted.user)
    if wanted.since is not None:
        query = query.where(FEEDBACK.created >= wanted.since)
    if wanted.until is not None:
        query = query.where(FEEDBACK.created < wanted.until)
    if wanted.profile is not None:
        name, _, version = wanted.profile.partition("#")
        steered = select(PROFILES.feedback).where(
            PROFILES.profile == name, PROFILES.version.startswith(version, autoescape=True)
        )
        query = query.where(FEEDBACK.seq.in_(steered))
    return query


def is_deleted(connection: Connection, user: str | None) -> bool:
    if user is None:
        return False
    return connection.execute(OF_DELETED, {"digest": digest_of(user)}).first() is not None


def delete_user(connection: Connection, user: str, now: float) -> Deleted | None:
    """Delete what is known of a user: their feedback, their generations, those without a user that their feedback is
    about, and the feedback of others on their generations, which has copies of their texts. A user of whom nothing is
    known is None; one who was deleted before has nothing left."""
    before = is_deleted(connection, user)
    of_user = select(FEEDBACK.seq).where(FEEDBACK.user == user)
    named = select(ANSWERS.generation).where(ANSWERS.feedback.in_(of_user), ANSWERS.generation.is_not(None))
    generations = connection.execute(
        delete(tables.generations).where(
            or_(GENERATIONS.user == user, GENERATIONS.user.is_(None) & GENERATIONS.id.in_(named))
        )
    ).rowcount
    own = connection.execute(delete(tables.feedback).where(FEEDBACK.user == user)).rowcount
    about = select(ANSWERS.feedback).where(ANSWERS.user == user)
    others = connection.execute(delete(tables.feedback).where(FEEDBACK.seq.in_(about))).rowcount
    found = Deleted(own, others, generations)
    if not before:
        if found == Deleted():
            return None
        connection.execute(insert(tables.deleted_users), {"digest": digest_of(user), "deleted": now})
    return found


def prune(connection: Connection, *, generations_before: float | None, feedback_before: float | None) -> Deleted:
    """Delete what is older than these times."""
    generations = feedback = 0
    if generations_before is not None:
        query = delete(tables.generations).where(GENERATIONS.created < generations_before)
        generations = connection.execute(query).rowcount
    if feedback_before is not None:
        feedback = connection.execute(delete(tables.feedback).where(FEEDBACK.created < feedback_before)).rowcount
    return Deleted(feedback=feedback, generations=generations)


def restore(connection: Connection, one: Stored) -> str:
    """Store feedback of an export: `added`, `known` if it is there already, or `deleted_user`."""
    if any(is_deleted(connection, user) for user in (one.user, *one.users)):
        return "deleted_user"
    same = FEEDBACK.id == one.id
    if one.idempotency_key is not None:
        same |= (FEEDBACK.tenant == one.tenant) & (FEEDBACK.idempotency_key == one.idempotency_key)
    if connection.execute(select(FEEDBACK.seq).where(same)).first() is not None:
        return "known"
    put(connection, one)
    return "added"
