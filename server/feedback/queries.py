"""What is read from the feedback database and deleted from it, inside the caller's transaction."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy import Connection, Select, delete, func, insert, or_, select

from server.feedback import tables
from server.feedback.items import Answer, Deleted, Filter, Stored, digest_of

PAGE = 500
FEEDBACK = tables.feedback.c
GENERATIONS = tables.generations.c
ANSWERS = tables.answers.c
PROFILES = tables.profiles.c
DELETED = tables.deleted_users.c


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


def delete_user(connection: Connection, user: str, now: float) -> Deleted | None:
    """Delete what is known of a user: their feedback, their generations, those without a user that their feedback is
    about, and the feedback of others on their generations, which has copies of their texts. A user of whom nothing is
    known is None; one who was deleted before has nothing left."""
    digest = digest_of(user)
    before = connection.execute(select(DELETED.digest).where(DELETED.digest == digest)).first() is not None
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
        connection.execute(insert(tables.deleted_users), {"digest": digest, "deleted": now})
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
