"""The publication of what jobs made, after a server that was killed in the middle of one: once, and never over what
somebody else has changed."""

from __future__ import annotations

import asyncio
import hashlib
import time
from pathlib import Path
from typing import Any

import pytest

from server.engines.pool import DaemonPool
from server.engines.torch.engine import TorchEngine
from server.feedback.database import Database
from server.jobs import job_queries
from server.jobs.job import Job, Publication, new_id
from server.jobs.job_folders import JobFolders
from server.jobs.publisher import Publisher
from server.profiles.audit import Author
from server.profiles.changes import ProfileChanges
from server.profiles.registry import ProfileRegistry
from server.profiles.versions import ProfileStore
from steering_vectors.profiles.files import save_profile
from tests.support.serving import engine_fixture, random_profile

pytestmark = pytest.mark.slow

engine = engine_fixture(slots=2, context=64)


class Press:
    """A publisher over a profile directory and a database."""

    def __init__(self, engine: TorchEngine, database: Database, directory: Path) -> None:
        self.engine, self.database, self.directory = engine, database, directory
        self.folders = JobFolders(directory / ".trimtab" / "jobs")
        self.name = self.folders.open()

    def finished(self, seed: int = 0, before: str | None = None, **conditions: str) -> Job:
        """A job that has made a profile. `before` is there if a server had begun to publish it."""
        job = new_id()
        self.folders.create(job, None, None)
        file = save_profile(random_profile(self.engine.info.identity, "warm", seed=seed), self.folders.path(job))
        version = hashlib.sha256(file.read_bytes()).hexdigest()
        stored = Job(0, job, "fit", "warm", "queued", {}, {}, conditions, Author("team", "::1"), time.time())
        with self.database.writing() as connection:
            job_queries.add(connection, stored, self.name)
            job_queries.begin(connection, job, 1.0)
            job_queries.complete(connection, job, 2.0, {}, Publication(version, before))
        return self.get(job)

    def get(self, job: str) -> Job:
        with self.database.reading() as connection:
            found = job_queries.get(connection, self.name, job)
        assert found is not None
        return found

    def put(self, seed: int) -> str:
        """A file that somebody puts into the directory; its version."""
        file = save_profile(random_profile(self.engine.info.identity, "warm", seed=seed), self.directory)
        return hashlib.sha256(file.read_bytes()).hexdigest()

    def publish(self) -> list[dict[str, Any]]:
        """Publish what is finished, as a server that has just started; the uploads of the audit log."""
        return asyncio.run(self._publish())

    async def _publish(self) -> list[dict[str, Any]]:
        store = ProfileStore(self.directory)
        registry = ProfileRegistry(self.directory, self.engine, store=store)
        changes = ProfileChanges(store, registry, self.engine)
        await registry.start()
        pool = DaemonPool(1, "test")
        try:
            await Publisher(self.database, self.folders, self.name, pool, changes).publish_finished()
            return [one for one in await changes.log(100, "warm") if one["action"] == "upload"]
        finally:
            await registry.stop()
            changes.close()
            pool.close()

    @property
    def current(self) -> str | None:
        path = self.directory / "warm.safetensors"
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


@pytest.fixture
def press(engine: TorchEngine, database: Database, tmp_path: Path) -> Press:
    return Press(engine, database, tmp_path / "profiles")


def version(job: Job) -> str:
    assert job.publication is not None
    return job.publication.version


def test_a_profile_is_published_as_an_upload_is(press: Press) -> None:
    old = press.put(7)
    job = press.finished()
    (upload,) = press.publish()
    assert (upload["from_version"], upload["to_version"]) == (old, version(job))
    assert (upload["key"], upload["address"], upload["request_id"]) == ("team", "::1", job.id)
    assert press.current == version(job)
    assert press.get(job.id).state == "succeeded"
    assert not (press.folders.path(job.id) / "warm.safetensors").exists()
    assert press.publish() == [upload]


def test_one_that_was_published_before_the_server_died_is_not_published_again(press: Press) -> None:
    job = press.finished(before="")
    data = (press.folders.path(job.id) / "warm.safetensors").read_bytes()
    (press.directory / "warm.safetensors").write_bytes(data)
    assert press.publish() == []
    assert press.get(job.id).state == "succeeded"


def test_one_whose_publication_had_only_begun_is_published(press: Press) -> None:
    old = press.put(7)
    job = press.finished(before=old, if_match=f'"{old}"')
    assert len(press.publish()) == 1
    assert press.current == version(job)


def test_what_somebody_changed_meanwhile_stays(press: Press) -> None:
    job = press.finished(before="")
    theirs = press.put(7)
    assert press.publish() == []
    found = press.get(job.id)
    assert found.error is not None
    assert (found.state, found.error["code"]) == ("failed", "conflict")
    assert "was changed while this server was down" in found.error["message"]
    assert press.current == theirs


def test_one_that_was_published_and_replaced_has_succeeded(press: Press) -> None:
    job = press.finished()
    press.publish()
    theirs = press.put(7)
    with press.database.writing() as connection:  # as if the server had died before it could say so
        connection.exec_driver_sql("UPDATE jobs SET state = 'publishing'")
    assert len(press.publish()) == 1
    assert press.get(job.id).state == "succeeded"
    assert press.current == theirs


def test_conditions_hold_when_it_is_published(press: Press) -> None:
    old = press.put(7)
    job = press.finished(if_match='"0123456789"')
    assert press.publish() == []
    found = press.get(job.id)
    assert found.error is not None
    assert (found.state, found.error["code"]) == ("failed", "precondition_failed")
    assert press.current == old
