"""Publishes what jobs have made, in the server, by the same way as an upload: checked by the engine, within the quota,
with its line in the audit log and the version before it kept.

A server that is killed in the middle publishes again, unless the profile is there already. The version that was current
before is written down first, so that a profile that somebody else has changed meanwhile is left alone.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from server.engines.errors import Conflict, Overloaded, Unavailable, UnknownProfile
from server.engines.pool import DaemonPool
from server.feedback.database import Database
from server.jobs import job_queries
from server.jobs.job import Job, failure_of
from server.jobs.job_folders import JobFolders
from server.profiles.audit import Author
from server.profiles.changes import ProfileChanges
from server.profiles.directory_changes import Conditions
from steering_vectors.errors import TrimtabError
from steering_vectors.profiles.files import SUFFIX, read_regular

logger = logging.getLogger(__name__)

PIECE = 2**20  # bytes


class Publisher:
    """Publishes the finished jobs of one queue. Methods are called from the event loop."""

    def __init__(
        self, database: Database, folders: JobFolders, queue: str, pool: DaemonPool, changes: ProfileChanges
    ) -> None:
        self._database = database
        self._folders = folders
        self._queue = queue
        self._pool = pool
        self._changes = changes

    async def publish_finished(self) -> int:
        """Publish the profiles of all jobs that wait for it; returns how many jobs waited."""
        jobs = await self._pool.run(self._waiting)
        for job in jobs:
            lock = await self._pool.run(lambda job=job: self._folders.lock(job.id))  # type: ignore[misc]
            if lock is not None:  # the worker has let go of it, and no other server publishes it
                try:
                    await self._publish(job)
                finally:
                    os.close(lock)
        return len(jobs)

    async def _publish(self, job: Job) -> None:
        found = await self._pool.run(lambda: self._get(job.id))
        if found is None or found.state != "publishing":
            return
        try:
            await self._upload(found)
        except (Overloaded, Unavailable) as error:
            logger.warning("the profile of %s cannot be published yet: %s", job.id, error.message)
        except TrimtabError as error:
            failed = partial(job_queries.fail, now=time.time(), error=failure_of(error), state="publishing")
            await self._pool.run(lambda: self._write(failed, job))
        else:
            await self._pool.run(lambda: self._write(partial(job_queries.succeed, now=time.time()), job))
            await self._pool.run(lambda: self._made(job).unlink(missing_ok=True))

    async def _upload(self, job: Job) -> None:
        """Raises what an upload raises, and Conflict if somebody has changed the profile meanwhile."""
        wanted = job.publication
        assert wanted is not None
        versions = await self._versions(job.profile)
        current = next((version for version, is_current in versions.items() if is_current), "")
        if current == wanted.version:  # it was done before the server was killed
            return
        if wanted.before is None:
            noted = replace(wanted, before=current)
            await self._pool.run(lambda: self._write(partial(job_queries.note_publication, publication=noted), job))
        elif wanted.before != current:
            if wanted.version in versions:  # it was done, and replaced since
                return
            raise Conflict(
                f"profile {job.profile!r} was changed while this server was down, before it could publish the job's "
                f"version {wanted.version[:8]}: look at the new one, and ask again if the job's is wanted",
                param="name",
            )
        file = self._made(job)
        author = Author(job.author.key, job.author.address, job.id)
        await self._changes.upload(job.profile, self._pieces(file), Conditions(**job.conditions), author)

    async def _pieces(self, file: Path) -> AsyncIterator[bytes]:
        data = await self._pool.run(lambda: read_regular(file))
        for start in range(0, len(data), PIECE):
            yield data[start : start + PIECE]

    async def _versions(self, profile: str) -> dict[str, bool]:
        """The versions of a profile that are kept, and whether each is the current one."""
        with suppress(UnknownProfile):
            return {one.version: one.current for one in await self._changes.versions(profile)}
        return {}

    def _made(self, job: Job) -> Path:
        return self._folders.path(job.id) / f"{job.profile}{SUFFIX}"

    # In a thread.

    def _waiting(self) -> list[Job]:
        with self._database.reading() as connection:
            return job_queries.in_state(connection, self._queue, "publishing")

    def _get(self, job: str) -> Job | None:
        with self._database.reading() as connection:
            return job_queries.get(connection, self._queue, job)

    def _write(self, change: Callable[..., None], job: Job) -> None:
        with self._database.writing() as connection:
            change(connection, job.id)
