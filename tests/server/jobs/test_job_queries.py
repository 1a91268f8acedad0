"""Changes of a job's state: each begins from one state, so that of several processes one makes it."""

from __future__ import annotations

import time

import pytest

from server.feedback.database import Database
from server.jobs import job_queries
from server.jobs.job import MAX_ATTEMPTS, Job, Publication, State, new_id
from server.profiles.audit import Author

pytestmark = pytest.mark.slow


def added(database: Database, queue: str = "a", kind: str = "fit", profile: str = "warm") -> str:
    who, given, data = Author("k", "::1"), {"if_match": "*"}, {"source": "demo:warm"}
    job = Job(0, new_id(), kind, profile, "queued", {"seed": 1}, data, given, who, 1.5)
    with database.writing() as connection:
        job_queries.add(connection, job, queue)
    return job.id


def get(database: Database, job: str) -> Job:
    with database.reading() as connection:
        found = job_queries.get(connection, "a", job)
    assert found is not None
    return found


def test_a_job_is_stored_as_it_was_asked_for(database: Database) -> None:
    found = get(database, added(database))
    assert (found.state, found.created, found.attempts, found.cancelling) == ("queued", 1.5, 0, False)
    assert (found.options, found.data, found.conditions) == ({"seed": 1}, {"source": "demo:warm"}, {"if_match": "*"})
    assert found.author == Author("k", "::1")
    assert (found.progress, found.publication, found.result, found.error) == (None, None, None, None)
    with database.reading() as connection:
        assert job_queries.get(connection, "b", found.id) is None  # another directory's


def test_a_job_begins_once(database: Database) -> None:
    job = added(database)
    with database.writing() as connection:
        assert job_queries.begin(connection, job, 2.0)
        assert not job_queries.begin(connection, job, 3.0)
        job_queries.note(connection, job, {"stage": "capture", "done": 1, "total": 2, "detail": ""})
    found = get(database, job)
    assert (found.state, found.started, found.attempts) == ("running", 2.0, 1)
    assert found.progress == {"stage": "capture", "done": 1, "total": 2, "detail": ""}


def test_what_was_published_is_noted_before_it_is(database: Database) -> None:
    job = added(database)
    with database.writing() as connection:
        job_queries.begin(connection, job, 2.0)
        job_queries.complete(connection, job, 3.0, {"unit": 1.0}, Publication("ab" * 32, None))
    assert (get(database, job).state, get(database, job).ended) == ("publishing", None)
    with database.writing() as connection:
        job_queries.cancel(connection, job, 3.5)  # too late
        job_queries.note_publication(connection, job, Publication("ab" * 32, "cd" * 32))
        job_queries.succeed(connection, job, 4.0)
        job_queries.fail(connection, job, 5.0, {"code": "x", "message": "y"}, state="publishing")
    found = get(database, job)
    assert (found.state, found.ended, found.result, found.error) == ("succeeded", 4.0, {"unit": 1.0}, None)
    assert found.publication == Publication("ab" * 32, "cd" * 32)


@pytest.mark.parametrize("end", ["complete", "fail", "give_back", "die"])
def test_a_job_that_is_to_be_stopped_ends_cancelled_however_it_ends(database: Database, end: str) -> None:
    job = added(database)
    with database.writing() as connection:
        job_queries.begin(connection, job, 2.0)
        job_queries.cancel(connection, job, 2.5)
        assert job_queries.is_cancelling(connection, job)
        if end == "complete":
            job_queries.complete(connection, job, 3.0, {}, Publication("ab" * 32, None))
        elif end == "fail":
            job_queries.fail(connection, job, 3.0, {"code": "x", "message": "y"})
        else:
            job_queries.give_back(connection, job, 3.0, "was killed" if end == "die" else None)
    found = get(database, job)
    assert (found.state, found.ended, found.publication, found.error) == ("cancelled", 3.0, None, None)


def test_a_queued_job_is_cancelled_at_once(database: Database) -> None:
    job = added(database)
    with database.writing() as connection:
        job_queries.cancel(connection, job, 2.0)
        assert not job_queries.begin(connection, job, 3.0)
    assert (get(database, job).state, get(database, job).ended) == ("cancelled", 2.0)


def test_a_job_whose_worker_ends_has_not_tried(database: Database) -> None:
    job = added(database)
    with database.writing() as connection:
        for _ in range(MAX_ATTEMPTS + 2):
            assert job_queries.begin(connection, job, 2.0)
            job_queries.give_back(connection, job, 3.0, None)
    assert (get(database, job).state, get(database, job).attempts) == ("queued", 0)


def test_pages_and_counts(database: Database) -> None:
    jobs = [added(database, kind=kind) for kind in ("fit", "calibrate", "fit", "evaluate")]
    other = added(database, profile="kind")
    added(database, queue="b")
    with database.writing() as connection:
        job_queries.cancel(connection, jobs[0], 2.0)

        def ids(
            state: State | None = None,
            kind: str | None = None,
            profile: str | None = None,
            before: int | None = None,
            limit: int = 9,
        ) -> list[str]:
            found = job_queries.page(
                connection, "a", state=state, kind=kind, profile=profile, before=before, limit=limit
            )
            return [one.id for one in found]

        assert ids() == [other, *reversed(jobs)]
        assert ids(limit=2) == [other, jobs[3]]
        second = job_queries.get(connection, "a", jobs[3])
        assert second is not None
        assert ids(before=second.seq) == [jobs[2], jobs[1], jobs[0]]
        assert ids(kind="fit", profile="warm") == [jobs[2], jobs[0]]
        assert ids(state="cancelled") == [jobs[0]]
        assert job_queries.counts(connection, "a") == {"queued": 4, "cancelled": 1}
        assert [one.id for one in job_queries.in_state(connection, "a", "queued")] == [*jobs[1:], other]


def test_only_ended_jobs_are_removed(database: Database) -> None:
    old, new, queued = added(database), added(database), added(database)
    with database.writing() as connection:
        job_queries.cancel(connection, old, 2.0)
        job_queries.cancel(connection, new, time.time())
        assert job_queries.ended_before(connection, "a", 3.0) == [old]
        for job in (old, queued):
            job_queries.remove(connection, job)
        assert job_queries.known(connection, "a", [old, new, queued, "job-1"]) == {new, queued}
        assert job_queries.is_cancelling(connection, old)  # whoever runs it stops
