"""Adds generations, feedback, and rows of exports to the database, inside the caller's transaction: those of many
requests at once, since a statement costs more than a row.

It relies on `Database.writing`, which runs no two writes at a time: what is looked up first does not change before the
rows are inserted.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple, TypeVar, cast

from sqlalchemy import BindParameter, Connection, Row, bindparam, insert, or_, select

from server.engines.errors import UnknownGeneration
from server.feedback import tables
from server.feedback.items import (
    Added,
    Answer,
    FeedbackError,
    IdempotencyConflict,
    Item,
    Kept,
    Outcome,
    Stored,
    Subject,
    Submission,
    UserDeleted,
    Who,
    digest_of,
)
from steering_vectors.errors import TrimtabError

T = TypeVar("T")
KeyOfTenant = tuple[str, str]  # a tenant and its idempotency key

NAMES = 500  # of one look-up; drivers bound the parameters of a statement
FEEDBACK = tables.feedback.c
GENERATIONS = tables.generations.c
DELETED = tables.deleted_users.c
OF_RECEIPT = {"profile": "name", "version": "version", "strength": "strength"}

# Made once: building a statement costs as much as running it.
INSERT_GENERATIONS = insert(tables.generations)
INSERT_FEEDBACK = insert(tables.feedback).returning(FEEDBACK.id, FEEDBACK.seq)
INSERT_ANSWERS = insert(tables.answers)
INSERT_PROFILES = insert(tables.profiles)
NAMED: BindParameter[Any] = bindparam("names", expanding=True)
OF_DELETED = select(DELETED.digest).where(DELETED.digest.in_(NAMED))
OF_IDS = select(FEEDBACK.id).where(FEEDBACK.id.in_(NAMED))
OF_KEYS = select(FEEDBACK.idempotency_key, FEEDBACK.id, FEEDBACK.created, FEEDBACK.digest).where(
    FEEDBACK.tenant == bindparam("tenant"), FEEDBACK.idempotency_key.in_(NAMED)
)
OF_GENERATIONS = (
    select(tables.generations)
    .where(or_(GENERATIONS.id.in_(NAMED), GENERATIONS.answer_id.in_(NAMED)))
    .order_by(GENERATIONS.choice)
)


class Before(NamedTuple):
    """What is stored under an idempotency key."""

    id: str
    created: float
    digest: str


@dataclass(slots=True)
class Known:
    """What the database has of everything that is to be added, and what has been decided since."""

    deleted: frozenset[str] = frozenset()  # digests of users
    before: dict[KeyOfTenant, Before] = field(default_factory=dict)
    generations: Mapping[str, Sequence[Row[Any]]] = field(default_factory=dict)  # by their id and their answer's

    def is_deleted(self, user: str | None) -> bool:
        return bool(self.deleted) and user is not None and digest_of(user) in self.deleted


def store(connection: Connection, values: Sequence[Submission | Callable[[], Kept]]) -> list[Outcome]:
    """Store the feedback of many requests, and generations, which are built first. Generations are stored before all
    feedback, which may name them. The outcomes are those of `add` and `keep`, in the order of the values."""
    kept = iter(keep(connection, [value() for value in values if not isinstance(value, Submission)]))
    added = iter(add(connection, [value for value in values if isinstance(value, Submission)]))
    return [next(added) if isinstance(value, Submission) else (next(kept), None) for value in values]


def keep(connection: Connection, generations: Sequence[Kept]) -> list[bool]:
    """Store generations. False stands for one of a deleted user, which is not stored."""
    deleted = _deleted(connection, [one.user for one in generations])
    stored = [one.user is None or digest_of(one.user) not in deleted for one in generations]
    rows = [_generation_row(one) for one, is_stored in zip(generations, stored, strict=True) if is_stored]
    if rows:
        connection.execute(INSERT_GENERATIONS, rows)
    return stored


def add(connection: Connection, submissions: Sequence[Submission]) -> list[Outcome]:
    """Store the feedback of many requests, of each all or none. The outcome of each is its list of `Added`, or one of
    FeedbackError, UnknownGeneration, IdempotencyConflict and UserDeleted."""
    known = _known(connection, submissions)
    rows: list[Stored] = []
    outcomes: list[Outcome] = []
    for submission in submissions:
        try:
            added, new = _decided(submission, known)
        except TrimtabError as error:
            outcomes.append((None, error))
            continue
        for one in new:
            if one.idempotency_key is not None:
                known.before[one.tenant, one.idempotency_key] = Before(one.id, one.created, one.digest)
        rows += new
        outcomes.append((added, None))
    _insert(connection, rows)
    return outcomes


def restore(connection: Connection, rows: Sequence[Stored]) -> Counter[str]:
    """Store feedback of an export, and count what was `added`, `known` already, or left out for a `deleted_user`."""
    deleted = _deleted(connection, [user for one in rows for user in (one.user, *one.users)])
    keys = _before(connection, [(one.tenant, one.idempotency_key) for one in rows])
    ids = {row.id for names in _parts([one.id for one in rows]) for row in connection.execute(OF_IDS, {"names": names})}
    counts: Counter[str] = Counter()
    new: list[Stored] = []
    for one in rows:
        key = (one.tenant, one.idempotency_key)
        if any(user is not None and digest_of(user) in deleted for user in (one.user, *one.users)):
            counts["deleted_user"] += 1
        elif one.id in ids or key in keys:
            counts["known"] += 1
        else:
            counts["added"] += 1
            new.append(one)
            ids.add(one.id)
            if one.idempotency_key is not None:
                keys[one.tenant, one.idempotency_key] = Before(one.id, one.created, one.digest)
    _insert(connection, new)
    return counts


def _decided(submission: Submission, known: Known) -> tuple[list[Added], list[Stored]]:
    """The answer to one request, and what is to be stored for it. Raises what `add` gives as errors."""
    added: list[Added] = []
    new: list[Stored] = []
    sent: dict[KeyOfTenant, Before] = {}  # by this request
    who, now = submission.who, submission.now
    for item in submission.items:
        if known.is_deleted(item.user):
            message = "this user's feedback was deleted: send feedback under another id, or without one"
            raise UserDeleted(message, param=f"{item.where}user")
        digest = item.digest()
        if item.idempotency_key is not None:
            key = (who.tenant, item.idempotency_key)
            if (before := sent.get(key) or known.before.get(key)) is not None:
                added.append(_replayed(before, item, digest))
                continue
        found = [_answer(subject, item, who, known) for subject in item.subjects]
        _check_sides(item, [answer for answer, _ in found])
        one = Stored(
            0, _new_id(now), now, who.tenant, who.key, item.user, item.kind, item.value,
            item.idempotency_key, digest, [answer for answer, _ in found], [user for _, user in found],
        )  # fmt: skip
        if item.idempotency_key is not None:
            sent[who.tenant, item.idempotency_key] = Before(one.id, now, digest)
        new.append(one)
        added.append(Added(one.id, now))
    return added, new


def _new_id(now: float) -> str:
    """It begins with the time in milliseconds, so that the ids of a commit are neighbours in the index."""
    return f"fb-{int(1000 * now):012x}{secrets.token_hex(6)}"


def _replayed(before: Before, item: Item, digest: str) -> Added:
    if before.digest != digest:
        message = "this idempotency key was used for other feedback: send each feedback with a key of its own"
        raise IdempotencyConflict(message, param=f"{item.where}idempotency_key")
    return Added(before.id, before.created, replayed=True)


def _answer(subject: Subject, item: Item, who: Who, known: Known) -> tuple[Answer, str | None]:
    """A copy of what feedback is about, and the user who asked for it."""
    if subject.generation is None:
        assert subject.text is not None
        assert item.prompt is not None
        return {"prompt": item.prompt, "text": subject.text}, item.user
    rows = [row for row in known.generations.get(subject.generation, ()) if who.may_name(row.tenant)]
    if not rows:
        whose = "this key, or of those that it speaks for" if who.speaks_for else "this key"
        raise UnknownGeneration(
            f"there is no kept generation {subject.generation!r} of {whose}: it may be older than --keep-generations",
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


def _known(connection: Connection, submissions: Sequence[Submission]) -> Known:
    """Look up all that these name."""
    items = [(item, one.who) for one in submissions for item in one.items]
    names = {name for item, _ in items for one in item.subjects if (name := one.generation) is not None}
    generations: dict[str, list[Row[Any]]] = {name: [] for name in names}
    for part in _parts(names):
        for row in connection.execute(OF_GENERATIONS, {"names": part}):
            for name in {row.id, row.answer_id} & names:
                generations[name].append(row)
    return Known(
        _deleted(connection, [item.user for item, _ in items]),
        _before(connection, [(who.tenant, item.idempotency_key) for item, who in items]),
        generations,
    )


def _deleted(connection: Connection, users: Sequence[str | None]) -> frozenset[str]:
    """The digests of those of the users who were deleted."""
    digests = {digest_of(user) for user in users if user is not None}
    return frozenset(
        row.digest for names in _parts(digests) for row in connection.execute(OF_DELETED, {"names": names})
    )


def _before(connection: Connection, keys: Sequence[tuple[str, str | None]]) -> dict[KeyOfTenant, Before]:
    """What is stored under these idempotency keys."""
    of_tenants: dict[str, set[str]] = {}
    for tenant, key in keys:
        if key is not None:
            of_tenants.setdefault(tenant, set()).add(key)
    return {
        (tenant, row.idempotency_key): Before(row.id, row.created, row.digest)
        for tenant, own in of_tenants.items()
        for names in _parts(own)
        for row in connection.execute(OF_KEYS, {"tenant": tenant, "names": names})
    }


def _parts(names: Collection[T]) -> Iterator[list[T]]:
    left = iter(names)
    while part := list(islice(left, NAMES)):
        yield part


def _insert(connection: Connection, rows: Sequence[Stored]) -> None:
    if not rows:
        return
    made = connection.execute(INSERT_FEEDBACK, [_feedback_row(one) for one in rows])
    numbers = {row.id: row.seq for row in made}
    about = [(numbers[one.id], place, answer, user) for one in rows for place, (answer, user) in enumerate(_about(one))]
    if about:
        connection.execute(
            INSERT_ANSWERS,
            [
                {"feedback": seq, "place": place, "generation": answer.get("generation"), "user": user, "data": answer}
                for seq, place, answer, user in about
            ],
        )
    steered = [
        {"feedback": seq, "place": place, **{name: receipt[field] for name, field in OF_RECEIPT.items()}}
        for seq, place, answer, _ in about
        for receipt in cast(Sequence[dict[str, Any]], answer.get("steering", ()))
    ]
    if steered:
        connection.execute(INSERT_PROFILES, steered)


def _about(one: Stored) -> Iterator[tuple[Answer, str | None]]:
    return zip(one.answers, one.users, strict=True)


def _feedback_row(one: Stored) -> dict[str, Any]:
    return {
        "id": one.id,
        "created": one.created,
        "tenant": one.tenant,
        "key_name": one.key,
        "user": one.user,
        "kind": one.kind,
        "value": dict(one.value),
        "idempotency_key": one.idempotency_key,
        "digest": one.digest,
    }


def _generation_row(one: Kept) -> dict[str, Any]:
    return {
        "id": one.id,
        "answer_id": one.data.get("answer_id"),
        "choice": one.choice,
        "created": one.data["created"],
        "tenant": one.who.tenant,
        "key_name": one.who.key,
        "user": one.user,
        "data": one.data,
    }
