"""The worker: a small process beside the server that takes jobs from the queue, runs each in a child process, and
writes down what becomes of it.

It ends with the server: its standard input is a pipe that the server holds. Jobs that run then are stopped and queued
again. It loads no torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any, cast

from sqlalchemy.exc import SQLAlchemyError

from server.feedback import queries
from server.feedback.database import Database
from server.feedback.items import Filter
from server.feedback.trl import Exported, trl_rows
from server.jobs import job_queries
from server.jobs.child import written_settings
from server.jobs.job import Failure, Job, JobProgress, JobSettings, Publication, ServedModel, failure_of
from server.jobs.job_folders import BASE, FEEDBACK, LOG, PAIRS, JobFolders, machine_slot, write_rows
from server.jobs.job_queue import JobQueue
from server.jobs.kinds import KINDS
from server.observability.logs import LogFormat, set_up_logs
from steering_vectors.errors import DataError, TrimtabError, first_line

logger = logging.getLogger(__name__)

CHECK_SECONDS = 0.5  # between two looks at a running job: is it to be stopped, and how far has it come
RECOVERY_SECONDS = 2.0  # between two looks for jobs that nobody works on
EXIT_SECONDS = 10.0  # for which a child that has answered may take to end
KILLED = "was killed by signal {signal}"


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What the server tells its worker. `database` is a URL with its password, so it is not an argument."""

    database: str
    profiles: str
    folder: str
    queue: str
    model: ServedModel
    profile_versions: int = 5
    profile_quota_bytes: int = 2**30
    audit_log: str | None = None
    allow_model_mismatch: bool = False
    at_once: int = 1
    log_format: LogFormat = "text"
    log_level: str = "info"


@dataclass(slots=True)
class Outcome:
    """What a child has said, and how it ended."""

    result: Mapping[str, Any] | None = None
    error: Failure | None = None
    died: str | None = None
    stopped: bool = False
    progress: JobProgress | None = field(default=None)


class Worker:
    """Runs the jobs of one queue until it is told to stop."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._database = Database(settings.database)
        self._folders = JobFolders(Path(settings.folder))
        self._queue = JobQueue(self._database.url, settings.queue, self._take)
        self._stopping = threading.Event()
        self._taken: set[str] = set()  # by this process

    def run(self) -> None:
        """Take jobs until SIGTERM, or until `stop` is called."""
        self._consumer = self._queue.consumer(self._settings.at_once)
        recovering = threading.Thread(target=self._recover, name="trimtab-jobs-recovery", daemon=True)
        recovering.start()
        self._consumer.run()
        self._stopping.set()
        for _, thread in self._consumer.worker_threads:
            thread.join(EXIT_SECONDS)
        recovering.join(EXIT_SECONDS)
        self._queue.close()
        self._database.close()

    def stop(self) -> None:
        """Stop what runs, and have `run` return. May be called from any thread."""
        self._stopping.set()
        os.kill(os.getpid(), signal.SIGTERM)  # huey's main loop waits for it

    @property
    def _is_ending(self) -> bool:
        return self._stopping.is_set() or self._consumer.stop_flag.is_set()

    # A job's way through this process.

    def _take(self, job: str) -> None:
        """Run a job, once this machine has a place for it. Nothing is lost if this process dies meanwhile: the job is
        queued until `begin`, and afterwards its lock says whether somebody works on it."""
        self._taken.add(job)
        try:
            with suppress(_NotMine):
                slot = self._slot(job)
                try:
                    self._work(job, slot)
                finally:
                    os.close(slot)
        except (SQLAlchemyError, OSError) as error:
            logger.error("the job %s waits: %s: %s", job, type(error).__name__, first_line(error))
        except Exception:
            logger.exception("the job %s waits", job)
        finally:
            self._taken.discard(job)

    def _slot(self, job: str) -> int:
        """This machine's place for a job. Raises _NotMine if the job is not queued any more, or this process ends."""
        while (slot := machine_slot(self._settings.at_once)) is None:
            if self._stopping.wait(CHECK_SECONDS) or self._is_ending or self._get(job).state != "queued":
                raise _NotMine
        return slot

    def _work(self, job: str, slot: int) -> None:
        lock = self._folders.lock(job)
        if lock is None:
            return
        try:
            found = self._get(job)
            with self._database.writing() as connection:
                if self._is_ending or not job_queries.begin(connection, job, time.time()):
                    return
            logger.info("the job %s (%s %s) begins", job, found.kind, found.profile)
            try:
                outcome = self._attempt(found, (lock, slot))
            except TrimtabError as error:  # before there was a child
                outcome = Outcome(error=failure_of(error))
            except OSError as error:
                message = f"the job's folder cannot be used ({error.strerror}): see its disk"
                outcome = Outcome(error={"code": "jobs_unavailable", "message": message})
            self._write_down(found, outcome)
        finally:
            os.close(lock)

    def _attempt(self, job: Job, held: tuple[int, ...]) -> Outcome:
        """Start a child and follow it. It holds the descriptors as long as it lives."""
        folder, kind = self._folders.path(job.id), KINDS[job.kind]
        settings = JobSettings(
            job.profile,
            job.options,
            folder,
            self._settings.model,
            data=self._data(job, folder),
            base=folder / BASE if kind.needs_profile else None,
            database=self._settings.database,
            profiles=Path(self._settings.profiles),
            profile_versions=self._settings.profile_versions,
            profile_quota_bytes=self._settings.profile_quota_bytes,
            audit_log=None if self._settings.audit_log is None else Path(self._settings.audit_log),
            author=replace(job.author, request_id=job.id),
            allow_model_mismatch=self._settings.allow_model_mismatch,
        )
        reading, writing = os.pipe()
        with os.fdopen(reading, "rb") as messages, (folder / LOG).open("ab") as log:
            log.write(f"-- attempt {job.attempts + 1} begins {_now()}\n".encode())
            log.flush()
            child = subprocess.Popen(
                [sys.executable, "-c", "from server.jobs.child import main; main()", str(writing), kind.run],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(writing, *held),
                env=_environment(),
            )
            os.close(writing)
            try:
                assert child.stdin is not None
                with suppress(BrokenPipeError):  # it died
                    child.stdin.write(json.dumps(written_settings(settings)).encode() + b"\n")
                    child.stdin.flush()
                return self._follow(job, child, messages)
            finally:
                child.kill()
                child.wait()
                with suppress(BrokenPipeError):
                    cast(IO[bytes], child.stdin).close()

    def _follow(self, job: Job, child: subprocess.Popen[bytes], messages: IO[bytes]) -> Outcome:
        """Read what a child sends until it ends; end it if the job is to be stopped."""
        received: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        threading.Thread(target=_receive, args=(messages, received), daemon=True).start()
        outcome, noted, last = Outcome(), None, time.monotonic()
        while True:
            with suppress(Empty):
                message = received.get(timeout=CHECK_SECONDS)
                if message is None:
                    break
                outcome.progress = message.get("progress", outcome.progress)
                outcome.result = message.get("result", outcome.result)
                outcome.error = message.get("error", outcome.error)
            if time.monotonic() - last < CHECK_SECONDS:
                continue
            last = time.monotonic()
            if self._is_ending or self._is_cancelled(job.id, None if outcome.progress is noted else outcome):
                outcome.stopped = True
                return outcome
            noted = outcome.progress
        try:
            code = child.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
        if outcome.result is None and outcome.error is None:
            outcome.died = KILLED.format(signal=-code) if code < 0 else f"ended with exit code {code}"
        return outcome

    def _is_cancelled(self, job: str, outcome: Outcome | None) -> bool:
        """Whether a job is to be stopped; notes its progress, if that is new. A database that is away does not end a
        job."""
        try:
            if outcome is not None and outcome.progress is not None:
                with self._database.writing() as connection:
                    job_queries.note(connection, job, outcome.progress)
            with self._database.reading() as connection:
                return job_queries.is_cancelling(connection, job)
        except SQLAlchemyError as error:
            logger.warning("the progress of %s cannot be written (%s)", job, type(error).__name__)
            return False

    def _write_down(self, job: Job, outcome: Outcome) -> None:
        """Store what became of an attempt, and queue the job again if it did not end."""
        publication = self._publication(outcome)
        now = time.time()
        with self._database.writing() as connection:
            if outcome.progress is not None:
                job_queries.note(connection, job.id, outcome.progress)
            if outcome.stopped or outcome.died is not None:
                job_queries.give_back(connection, job.id, now, outcome.died)
            elif outcome.error is not None:
                job_queries.fail(connection, job.id, now, outcome.error)
            else:
                assert outcome.result is not None
                job_queries.complete(connection, job.id, now, outcome.result["figures"], publication)
        state = self._get(job.id).state
        logger.info("the job %s is %s", job.id, state)
        if state in ("succeeded", "failed", "cancelled", "publishing"):
            self._folders.remove_data(job.id)

    def _publication(self, outcome: Outcome) -> Publication | None:
        if outcome.result is None or outcome.result["file"] is None:
            return None
        data = Path(outcome.result["file"]).read_bytes()
        return Publication(hashlib.sha256(data).hexdigest(), None)

    def _data(self, job: Job, folder: Path) -> str | None:
        """What the job's function reads. Feedback is exported once, so that another attempt reads the same. Raises
        DataError if there is none."""
        data = job.data
        if data.get("source") is not None:
            return str(data["source"])
        if data.get("pairs"):
            return PAIRS
        if (rows := data.get("feedback")) is None:
            return None
        if not (folder / FEEDBACK).exists():
            counts = Exported()
            with self._database.reading() as connection:
                stored = queries.everything(connection, Filter(profile=data.get("feedback_profile")))
                write_rows(folder / FEEDBACK, trl_rows(stored, rows, counts))
            if not counts.rows:
                (folder / FEEDBACK).unlink()
                left = ", ".join(f"{count}: {reason}" for reason, count in counts.left_out.items()) or "there is none"
                raise DataError(f"the feedback has no {rows} rows ({left})")
        return FEEDBACK

    # Jobs that nobody works on.

    def _recover(self) -> None:
        while not self._stopping.wait(RECOVERY_SECONDS):
            try:
                self._recover_once()
            except Exception as error:
                logger.error("jobs cannot be looked at: %s: %s", type(error).__name__, first_line(error))

    def _recover_once(self) -> None:
        """Queue jobs again whose process has died, and send the messages of queued jobs that were lost."""
        with self._database.reading() as connection:
            running = job_queries.in_state(connection, self._settings.queue, "running")
        for job in running:
            if job.id not in self._taken and (lock := self._folders.lock(job.id)) is not None:
                try:
                    self._give_back_dead(job)
                finally:
                    os.close(lock)
        with self._database.reading() as connection:
            queued = job_queries.in_state(connection, self._settings.queue, "queued")
        waiting = self._queue.waiting() if queued else set()
        for job in queued:
            if job.id not in waiting and job.id not in self._taken:
                self._queue.put(job.id)

    def _give_back_dead(self, job: Job) -> None:
        """Within the job's lock, which nobody else holds."""
        logger.warning("the worker of the job %s died", job.id)
        with self._database.writing() as connection:
            job_queries.give_back(connection, job.id, time.time(), "died with its worker")
        if self._get(job.id).state != "queued":
            self._folders.remove_data(job.id)

    def _get(self, job: str) -> Job:
        """Raises _NotMine for a job that is gone."""
        with self._database.reading() as connection:
            found = job_queries.get(connection, self._settings.queue, job)
        if found is None:
            raise _NotMine
        return found


class _NotMine(Exception):
    """The job is not this process's to run any more."""


def main() -> None:
    """The worker's main function: one line of settings on standard input, which then stays open."""
    found = json.loads(sys.stdin.buffer.readline())
    settings = WorkerSettings(**{**found, "model": ServedModel(**found["model"])})
    set_up_logs(settings.log_format, settings.log_level)
    logging.getLogger("huey").setLevel(logging.CRITICAL)  # this worker says it in a line
    worker = Worker(settings)
    threading.Thread(target=_stop_with_server, args=(worker,), daemon=True).start()
    worker.run()


def written(settings: WorkerSettings) -> bytes:
    """The line that `main` reads."""
    return json.dumps(asdict(settings)).encode() + b"\n"


def _stop_with_server(worker: Worker) -> None:
    with suppress(OSError):
        while sys.stdin.buffer.read(1024):
            pass
    worker.stop()


def _receive(messages: IO[bytes], received: SimpleQueue[dict[str, Any] | None]) -> None:
    """Pass messages on, and None at their end. A last one that was cut off is not passed on."""
    with suppress(OSError, ValueError):
        for line in messages:
            received.put(json.loads(line))
    received.put(None)


def _environment() -> dict[str, str]:
    """That of the worker, with its import path. Threads of the child do not spin: the server's threads need the
    processors more."""
    path = os.pathsep.join(place or str(Path.cwd()) for place in sys.path)
    return {**os.environ, "PYTHONPATH": path, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


if __name__ == "__main__":
    main()
