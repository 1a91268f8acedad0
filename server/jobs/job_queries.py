"""What is read from and written to the table of jobs, inside the caller's transaction.

A change of state names the state that it begins from, so that of several processes one makes it. Writes rely on
`Database.writing`, which runs no two of them at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

from sqlalchemy import Connection, Row, Select, delete, func, insert, null, select, update

from server.feedback import tables
from server.jobs.job import (
    ENDED,
    MAX_ATTEMPTS,
    Failure,
    Job,
    JobProgress,
    Publication,
    State,
)
from server.profiles.audit import Author

JOBS = tables.jobs.c
NOTHING = null()  # SQL's, where None would be written as JSON's


def add(connection: Connection, job: Job, queue: str) -> None:
    connection.execute(
        insert(tables.jobs),
        {
            "id": job.id,
            "queue": queue,
            "kind": job.kind,
            "profile": job.profile,
            "state": job.state,
            "options": dict(job.options),
            "data": dict(job.data),
            "conditions": dict(job.conditions),
            "key_name": job.author.key,
            "address": job.author.address,
            "created": job.created,
            "attempts": 0,
            "cancelling": False,
        },
    )


def get(connection: Connection, queue: str, job: str) -> Job | None:
    row = connection.execute(_of(queue).where(JOBS.id == job)).first()
    return None if row is None else _job(row)


def page(
    connection: Connection,
    queue: str,
    *,
    state: State | None,
    kind: str | None,
    profile: str | None,
    before: int | None,
    limit: int,
) -> list[Job]:
    """Jobs, the newest first, from before a `seq`."""
    wanted = _of(queue)
    for column, value in ((JOBS.state, state), (JOBS.kind, kind), (JOBS.profile, profile)):
        if value is not None:
            wanted = wanted.where(column == value)
    if before is not None:
        wanted = wanted.where(JOBS.seq < before)
    return [_job(row) for row in connection.execute(wanted.order_by(JOBS.seq.desc()).limit(limit))]


def in_state(connection: Connection, queue: str, state: State) -> list[Job]:
    """The jobs of a state, in the order of their requests."""
    return [_job(row) for row in connection.execute(_of(queue).where(JOBS.state == state).order_by(JOBS.seq))]


def counts(connection: Connection, queue: str) -> dict[State, int]:
    """The number of jobs in each state that has any."""
    found = select(JOBS.state, func.count()).where(JOBS.queue == queue).group_by(JOBS.state)
    return {cast(State, state): count for state, count in connection.execute(found)}


def begin(connection: Connection, job: str, now: float) -> bool:
    """Let a queued job run; False if it is not queued any more."""
    values = {"state": "running", "started": now, "attempts": JOBS.attempts + 1, "progress": NOTHING}
    return _change(connection, job, "queued", **values)


def note(connection: Connection, job: str, progress: JobProgress) -> None:
    """Note the progress of a running job."""
    _change(connection, job, "running", progress=dict(progress))


def is_cancelling(connection: Connection, job: str) -> bool:
    """Whether a job is to be stopped; also if it is gone."""
    return connection.execute(select(JOBS.cancelling).where(JOBS.id == job)).scalar_one_or_none() is not False


def cancel(connection: Connection, job: str, now: float) -> None:
    """Cancel a job that is queued, and have one that runs stopped."""
    if not _change(connection, job, "queued", state="cancelled", ended=now):
        _change(connection, job, "running", cancelling=True)


def complete(
    connection: Connection, job: str, now: float, figures: Mapping[str, Any], publication: Publication | None
) -> None:
    """Store what a running job has found: it succeeded, or its profile is to be published. One that is to be stopped
    is cancelled all the same."""
    if _stop(connection, job, now):
        return
    if publication is None:
        _change(connection, job, "running", state="succeeded", ended=now, result=dict(figures))
    else:
        published = asdict(publication)
        _change(connection, job, "running", state="publishing", result=dict(figures), publication=published)


def fail(connection: Connection, job: str, now: float, error: Failure, *, state: State = "running") -> None:
    """Store why a job failed. One that is to be stopped is cancelled."""
    if state != "running" or not _stop(connection, job, now):
        _change(connection, job, state, state="failed", ended=now, error=dict(error))


def give_back(connection: Connection, job: str, now: float, died: str | None) -> None:
    """Queue a running job again, whose worker ends, or whose process `died` in a way. The latter fails in the end."""
    if _stop(connection, job, now):
        return
    if died is None:
        _change(connection, job, "running", state="queued", attempts=JOBS.attempts - 1)
        return
    attempts = connection.execute(select(JOBS.attempts).where(JOBS.id == job)).scalar_one()
    if attempts < MAX_ATTEMPTS:
        _change(connection, job, "running", state="queued")
        return
    message = (
        f"the job's process {died}, for the {attempts}th time: its log may say why; often memory was short, so see the "
        "kernel's log, or ask for less"
    )
    error: Failure = {"code": "job_died", "message": message.replace("3th", "3rd")}
    _change(connection, job, "running", state="failed", ended=now, error=dict(error))


def note_publication(connection: Connection, job: str, publication: Publication) -> None:
    _change(connection, job, "publishing", publication=asdict(publication))


def succeed(connection: Connection, job: str, now: float) -> None:
    """End a job whose profile is published."""
    _change(connection, job, "publishing", state="succeeded", ended=now)


def remove(connection: Connection, job: str) -> None:
    connection.execute(delete(tables.jobs).where(JOBS.id == job, JOBS.state.in_(ENDED)))


def ended_before(connection: Connection, queue: str, last: float) -> list[str]:
    """The jobs that ended before a time."""
    wanted = select(JOBS.id).where(JOBS.queue == queue, JOBS.state.in_(ENDED), JOBS.ended < last)
    return list(connection.execute(wanted).scalars())


def known(connection: Connection, queue: str, jobs: Sequence[str]) -> set[str]:
    """Those of some ids that are jobs."""
    return set(connection.execute(select(JOBS.id).where(JOBS.queue == queue, JOBS.id.in_(jobs))).scalars())


def _stop(connection: Connection, job: str, now: float) -> bool:
    """Cancel a running job that is to be stopped; whether it was."""
    stopped = update(tables.jobs).where(JOBS.id == job, JOBS.state == "running", JOBS.cancelling.is_(True))
    return connection.execute(stopped.values(state="cancelled", ended=now)).rowcount == 1


def _change(connection: Connection, job: str, before: State, **values: Any) -> bool:
    changed = update(tables.jobs).where(JOBS.id == job, JOBS.state == before).values(**values)
    return connection.execute(changed).rowcount == 1


def _of(queue: str) -> Select[Any]:
    return select(tables.jobs).where(JOBS.queue == queue)


def _job(row: Row[Any]) -> Job:
    return Job(
        seq=row.seq,
        id=row.id,
        kind=row.kind,
        profile=row.profile,
        state=cast(State, row.state),
        options=row.options,
        data=row.data,
        conditions=row.conditions,
        author=Author(row.key_name, row.address),
        created=row.created,
        started=row.started,
        ended=row.ended,
        attempts=row.attempts,
        cancelling=row.cancelling,
        progress=row.progress,
        publication=None if row.publication is None else Publication(**row.publication),
        result=row.result,
        error=row.error,
    )
