"""The jobs of one server: takes orders, answers questions about jobs, cancels and deletes them, follows them, publishes
what they made, and keeps the worker running."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from server.engines.errors import Conflict, Overloaded, Unavailable
from server.engines.pool import DaemonPool
from server.jobs.job import ACTIVE, ENDED, Job, JobData, JobOrder, JobsUnavailable, State, UnknownJob, new_id
from server.jobs.job_folders import JobFolders
from server.jobs.kinds import KINDS, imported
from server.profiles.audit import Author
from server.profiles.changes import ProfileChanges
from server.profiles.directory_changes import Conditions
from server.profiles.versions import STATE, checked_name, storage_error
from server.settings import ConfigurationError
from steering_vectors.errors import DataError, RequestError, TrimtabError, first_line

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from server.feedback.database import Database
    from server.jobs.job_queue import JobQueue
    from server.jobs.publisher import Publisher
    from server.jobs.worker import WorkerSettings

T = TypeVar("T")

logger = logging.getLogger(__name__)

FOLDER = "jobs"
MAX_ACTIVE = 100  # jobs that have not ended
MAX_WAITING = 64  # questions
PUBLISH_SECONDS = 0.5  # between two looks for finished jobs
FOLLOW_SECONDS = 0.5  # between two looks at a job that is followed
REPEAT_SECONDS = 15.0  # after which an event is repeated, so that connections stay open
RETENTION_SECONDS = 60.0
TROUBLE_SECONDS = 5.0  # until work that failed is tried again
ABANDONED_SECONDS = 3600.0  # after which a folder without a job is removed
PUBLIC = re.compile(r"hf:[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w%.\[\]:-]+)?")  # no path of this machine
PAST = {
    "publishing": "is being published",
    "succeeded": "has succeeded already",
    "failed": "has failed already",
    "cancelled": "is cancelled already",
}
BUSY = "many questions about jobs wait: try again later"


class Jobs:
    """Belongs to one server. `keep` is for how many seconds ended jobs are kept, None for ever; `data` the directory
    whose files jobs may read."""

    def __init__(
        self,
        database: Database,
        folders: JobFolders,
        queue: JobQueue,
        worker: WorkerSettings,
        *,
        keep: float | None,
        data: Path | None,
    ) -> None:
        from server.jobs.worker_process import WorkerProcess

        self._database = database
        self._folders = folders
        self._queue = queue
        self._name = worker.queue
        self._keep = keep
        self._data = data
        self._pool = DaemonPool(2, "trimtab-jobs", max_waiting=MAX_WAITING, busy=BUSY)
        self.worker = WorkerProcess(worker)
        self.counts: Mapping[State, int] = {}  # of jobs, by state; a moment old
        self._changes: ProfileChanges | None = None
        self._publisher: Publisher | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._draining = asyncio.Event()

    @classmethod
    def open(
        cls,
        database: Database,
        profiles: Path,
        make_worker: Callable[[str, str], WorkerSettings],
        *,
        keep: float | None,
        data: Path | None,
    ) -> Jobs:
        """Make the folder of jobs and the queue, in a database that is migrated. `make_worker` gets the
        folder of jobs and the queue's name. Raises ConfigurationError."""
        try:
            from server.jobs.job_queue import JobQueue
        except ImportError as error:
            raise ConfigurationError("--jobs needs huey: pip install 'trimtab[feedback]'") from error
        folders = JobFolders(profiles / STATE / FOLDER)
        try:
            name = folders.open()
        except OSError as error:
            raise ConfigurationError(
                f"--jobs needs a directory of profiles that can be written, and {folders.root} cannot "
                f"({error.strerror}): mount it writable, or leave --jobs out"
            ) from error
        if data is not None and not data.is_dir():
            raise ConfigurationError(f"--jobs-data {data} is no directory: create it, or leave it out")
        return cls(
            database, folders, JobQueue(database.url, name), make_worker(str(folders.root), name), keep=keep, data=data
        )

    def start(self, changes: ProfileChanges) -> None:
        """Start the worker, publication and retention."""
        from server.jobs.publisher import Publisher

        self._changes = changes
        self._publisher = Publisher(self._database, self._folders, self._name, self._pool, changes)
        self.worker.start()
        for work, seconds in ((self._publish, PUBLISH_SECONDS), (self._prune, RETENTION_SECONDS)):
            self._tasks.append(asyncio.create_task(_repeat(work, seconds), name=f"trimtab-jobs{work.__name__}"))

    def drain(self) -> None:
        """End the streams of events."""
        self._draining.set()

    async def close(self) -> None:
        """Stop the worker, whose jobs are queued again."""
        self.drain()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.worker.close()
        self._pool.close()
        self._queue.close()

    async def submit(self, order: JobOrder, author: Author) -> Job:
        """Queue a job. Everything that can be known is checked first. Raises RequestError, UnknownProfile,
        PreconditionFailed, Overloaded, JobsUnavailable, and for a directory that cannot be written what an upload
        raises."""
        checked_name(order.profile)
        kind, conditions = KINDS[order.kind], {}
        await self._pool.run(lambda: _check(kind.check, order))
        base, version = None, await self._version(order.profile)
        Conditions(order.if_match, order.if_none_match).check(order.profile, version)
        for name, value in (("if_match", order.if_match), ("if_none_match", order.if_none_match)):
            if value is not None:
                conditions[name] = value
        if kind.needs_profile:
            assert self._changes is not None
            version, base = await self._changes.file(order.profile, None)
            conditions.setdefault("if_match", f'"{version}"')
        job = Job(
            0,
            new_id(),
            order.kind,
            order.profile,
            "queued",
            order.options,
            await self._pool.run(lambda: self._described(order.data)),
            conditions,
            author,
            time.time(),
        )
        pairs = None if order.data is None else order.data.pairs
        await self._in_thread(lambda: self._add(job, pairs, base))
        return await self.get(job.id)

    async def get(self, job: str) -> Job:
        """Raises UnknownJob and JobsUnavailable."""
        found = await self._in_thread(lambda: self._read(job))
        if found is None:
            raise UnknownJob(f"there is no job {job[:80]!r}", param="id")
        return found

    async def page(
        self, *, state: State | None, kind: str | None, profile: str | None, before: int | None, limit: int
    ) -> list[Job]:
        """Jobs, the newest first, from before a `seq`."""
        from server.jobs import job_queries

        def read() -> list[Job]:
            with self._database.reading() as connection:
                return job_queries.page(
                    connection, self._name, state=state, kind=kind, profile=profile, before=before, limit=limit
                )

        return await self._in_thread(read)

    async def cancel(self, job: str) -> Job:
        """Cancel a job that is queued, and have one that runs stopped, within seconds. Raises UnknownJob, and Conflict
        for one that has ended or is being published."""
        from server.jobs import job_queries

        found = await self.get(job)
        if found.state not in ("queued", "running"):
            raise Conflict(f"the job {job} {PAST[found.state]}", param="id")
        await self._write(lambda connection: job_queries.cancel(connection, job, time.time()))
        cancelled = await self.get(job)
        if cancelled.state == "cancelled":
            await self._in_thread(lambda: self._folders.remove_data(job))
        return cancelled

    async def delete(self, job: str) -> Job:
        """Delete an ended job, its log and its files. Raises UnknownJob, and Conflict for one that has not ended."""
        from server.jobs import job_queries

        found = await self.get(job)
        if found.state not in ENDED:
            raise Conflict(f"the job {job} is {found.state}: cancel it first", param="id")
        await self._write(lambda connection: job_queries.remove(connection, job))
        await self._in_thread(lambda: self._folders.remove(job))
        return found

    async def log(self, job: str) -> str:
        """What a job's process printed; the end, if it is long. Raises UnknownJob."""
        await self.get(job)
        return await self._in_thread(lambda: self._folders.log(job))

    async def follow(self, job: str) -> AsyncIterator[Job]:
        """A job whenever it has changed, until it has ended. Raises UnknownJob if it is deleted meanwhile, and
        Unavailable if the server shuts down."""
        last, said = None, 0.0
        while True:
            found = await self.get(job)
            if found != last or time.monotonic() - said > REPEAT_SECONDS:
                last, said = found, time.monotonic()
                yield found
            if found.state in ENDED:
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(self._draining.wait(), FOLLOW_SECONDS)
                raise Unavailable("the server is shutting down: the job is queued again", code="draining")

    async def _version(self, profile: str) -> str | None:
        """The version of a profile that is current; None if there is none."""
        from server.engines.errors import UnknownProfile

        assert self._changes is not None
        with suppress(UnknownProfile):
            return next((one.version for one in await self._changes.versions(profile) if one.current), None)
        return None

    async def _publish(self) -> None:
        self.counts = await self._in_thread(self._count)
        if self.counts.get("publishing"):
            assert self._publisher is not None
            await self._publisher.publish_finished()

    async def _prune(self) -> None:
        """Delete jobs that ended long ago, and folders that a server left behind when it was killed."""
        await self._in_thread(lambda: self._prune_now(time.time()))

    async def _write(self, change: Callable[[Connection], None]) -> None:
        def write() -> None:
            with self._database.writing() as connection:
                change(connection)

        await self._in_thread(write)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        from sqlalchemy.exc import SQLAlchemyError

        try:
            return await self._pool.run(work)
        except SQLAlchemyError as error:
            logger.error("the database of jobs cannot be used: %s", type(error).__name__)
            raise JobsUnavailable("the database of jobs cannot be used now: try again later") from error
        except OSError as error:
            raise storage_error(error) from error

    # In a thread.

    def _count(self) -> dict[State, int]:
        from server.jobs import job_queries

        with self._database.reading() as connection:
            return job_queries.counts(connection, self._name)

    def _described(self, data: JobData | None) -> dict[str, Any]:
        """Data as it is stored, without pairs. Raises RequestError for a source that jobs may not read."""
        if data is None:
            return {}
        source = None if data.source is None else checked_source(data.source, self._data)
        described = asdict(replace(data, source=source, pairs=None))
        return {**described, "pairs": None if data.pairs is None else len(data.pairs)}

    def _add(self, job: Job, pairs: Any, base: bytes | None) -> None:
        from server.jobs import job_queries

        if (active := sum(self._count().get(state, 0) for state in ACTIVE)) >= MAX_ACTIVE:
            raise Overloaded(f"{active} jobs wait or run already: try again later, or cancel some")
        self._folders.create(job.id, pairs, base)
        try:
            with self._database.writing() as connection:
                job_queries.add(connection, job, self._name)
        except BaseException:
            self._folders.remove(job.id)
            raise
        try:
            self._queue.put(job.id)
        except Exception as error:  # the worker looks for jobs whose message was lost
            logger.warning("the job %s begins later: %s: %s", job.id, type(error).__name__, first_line(error))

    def _read(self, job: str) -> Job | None:
        from server.jobs import job_queries

        with self._database.reading() as connection:
            return job_queries.get(connection, self._name, job)

    def _prune_now(self, now: float) -> None:
        from server.jobs import job_queries

        old: list[str] = []
        if self._keep is not None:
            with self._database.writing() as connection:
                old = job_queries.ended_before(connection, self._name, now - self._keep)
                for job in old:
                    job_queries.remove(connection, job)
        names = self._folders.names(ABANDONED_SECONDS)
        with self._database.reading() as connection:
            known = job_queries.known(connection, self._name, names)
        for job in [*old, *(name for name in names if name not in known)]:
            self._folders.remove(job)


def checked_source(source: str, data: Path | None) -> str:
    """What `load_pairs` may read: an embedded set, a public set, or a file in the directory of data, by its path there.
    Raises RequestError."""
    from steering_vectors.data.sources import DEMO, find_data

    if source.startswith(DEMO):
        try:
            find_data(source)
        except DataError as error:
            raise RequestError(error.message, param="data") from error
        return source
    if PUBLIC.fullmatch(source):
        return source
    if data is None:
        raise RequestError(
            f"data {source[:80]!r} is neither demo:NAME nor hf:NAME, and this server reads no files: send the rows as "
            "pairs, or start it with --jobs-data",
            param="data",
        )
    folder = data.resolve()
    path = (folder / source).resolve()
    if not path.is_relative_to(folder) or not path.is_file():
        raise RequestError(f"data {source[:80]!r} is no file in the server's --jobs-data", param="data")
    return str(path)


def _check(check: str | None, order: JobOrder) -> None:
    """Raise RequestError for options that cannot work."""
    if check is None:
        return
    try:
        imported(check)(order.options)
    except RequestError:
        raise
    except TrimtabError as error:
        raise RequestError(error.message, param=error.param, code=error.code) from error


async def _repeat(work: Callable[[], Any], seconds: float) -> None:
    while True:
        pause = seconds
        try:
            await work()
        except TrimtabError as error:
            logger.warning("jobs: %s", error.message)
            pause = max(seconds, TROUBLE_SECONDS)
        except Exception:
            logger.exception("jobs cannot be looked after")
            pause = max(seconds, TROUBLE_SECONDS)
        await asyncio.sleep(pause)
