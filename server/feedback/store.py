"""The feedback of one server: opens the database, takes feedback and generations, answers questions about them, and
deletes what is old."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from server.engines.pool import DaemonPool
from server.feedback.items import (
    Added,
    Deleted,
    FeedbackUnavailable,
    Filter,
    Item,
    Kept,
    Stored,
    Submission,
    UnknownUser,
    Who,
)
from server.feedback.writer import Write, Writer
from server.settings import ConfigurationError
from steering_vectors.errors import TrimtabError

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from server.feedback.database import Database

T = TypeVar("T")

logger = logging.getLogger(__name__)

RETENTION_SECONDS = 60.0  # between two looks at what is too old
MAX_READERS_WAITING = 64
BUSY = "many questions about feedback wait: try again later"


class FeedbackStore:
    """Belongs to one server. `keep_generations` and `keep_feedback` are seconds, None for ever; 0 keeps no generations.
    `noted` is called with what came of each generation: kept, full, failed or deleted_user."""

    def __init__(
        self,
        database: Database,
        *,
        keep_generations: float | None,
        keep_feedback: float | None,
        noted: Callable[[str], None] = lambda outcome: None,
        writer: Writer | None = None,
    ) -> None:
        self.database = database
        self.keeps_generations = keep_generations is None or keep_generations > 0
        self._keep_generations = keep_generations
        self._keep_feedback = keep_feedback
        self._noted = noted
        self._writer = writer or Writer(database.writing)
        self._readers = DaemonPool(2, "trimtab-feedback-reading", max_waiting=MAX_READERS_WAITING, busy=BUSY)
        self._retention: asyncio.Task[None] | None = None

    @classmethod
    def open(
        cls,
        url: str,
        *,
        keep_generations: float | None,
        keep_feedback: float | None,
        noted: Callable[[str], None] = lambda outcome: None,
    ) -> FeedbackStore:
        """Connect and migrate, which may take a minute while the database starts. Raises ConfigurationError."""
        try:
            from server.feedback.database import CONNECT_SECONDS, Database
        except ImportError as error:
            message = "--feedback-database needs SQLAlchemy and Alembic: pip install 'trimtab[feedback]'"
            raise ConfigurationError(message) from error
        database = Database(url)
        database.migrate(patience=CONNECT_SECONDS)
        logger.info("feedback is stored in %s", database.shown)
        return cls(database, keep_generations=keep_generations, keep_feedback=keep_feedback, noted=noted)

    @property
    def waiting(self) -> int:
        """The number of writes that wait."""
        return self._writer.waiting

    def start(self) -> None:
        """Begin to delete what is too old."""
        self._retention = asyncio.create_task(self._prune(), name="trimtab-feedback-retention")

    async def close(self) -> None:
        """Write what waits, and close the connections."""
        if self._retention is not None:
            self._retention.cancel()
            await asyncio.gather(self._retention, return_exceptions=True)
        await asyncio.to_thread(self._writer.close)
        self._readers.close()
        self.database.close()

    def keep(self, build: Callable[[], Kept], size: int) -> None:
        """Store a generation soon. Never waits: without room for it, it is counted and not kept."""
        from server.feedback import adding

        def done(kept: bool | None, error: Exception | None) -> None:
            self._noted("failed" if error is not None else "kept" if kept else "deleted_user")

        if not self._writer.put(Write(adding.store, build, size, done)):
            self._noted("full")

    async def add(self, items: Sequence[Item], who: Who) -> list[Added]:
        """Store feedback, all of it or none; it is committed when this returns. Raises FeedbackError,
        UnknownGeneration, IdempotencyConflict, UserDeleted, Overloaded, FeedbackUnavailable."""
        from server.feedback import adding

        submission = Submission(tuple(items), who, time.time())
        size = sum(_size(item) for item in items)
        added: list[Added] = await self._writer.submit(adding.store, submission, size, len(items))
        return added

    async def page(self, wanted: Filter, *, after: int, limit: int) -> list[Stored]:
        """Feedback in the order in which it was stored, after a `seq`. Raises FeedbackUnavailable."""
        from server.feedback import queries

        return await self._read(lambda connection: queries.page(connection, wanted, after=after, limit=limit))

    async def delete_user(self, user: str) -> Deleted:
        """Delete all that is known of a user, also of what waits to be written. Raises UnknownUser."""
        from server.feedback import queries

        found = await self._writer.run(partial(queries.delete_user, user=user, now=time.time()))
        if found is None:
            raise UnknownUser("nothing is stored of this user", param="user")
        await self._readers.run(self.database.forget)
        return found

    async def prune(self, now: float) -> Deleted:
        """Delete what has been stored for longer than the retention times allow. `now` is in seconds since 1970."""
        from server.feedback import queries

        def before(seconds: float | None) -> float | None:
            return None if seconds is None else now - seconds

        work = partial(
            queries.prune,
            generations_before=before(self._keep_generations),
            feedback_before=before(self._keep_feedback),
        )
        return await self._writer.run(work)

    async def _prune(self) -> None:
        while True:
            try:
                deleted = await self.prune(time.time())
                if deleted != Deleted():
                    message = "retention deleted %d generations and %d pieces of feedback"
                    logger.info(message, deleted.generations, deleted.feedback)
            except TrimtabError as error:
                logger.warning("retention could not delete what is old: %s", error.message)
            await asyncio.sleep(RETENTION_SECONDS)

    async def _read(self, work: Callable[[Connection], T]) -> T:
        from sqlalchemy.exc import SQLAlchemyError

        def read() -> T:
            with self.database.reading() as connection:
                return work(connection)

        try:
            return await self._readers.run(read)
        except SQLAlchemyError as error:
            logger.error("the feedback database cannot be read: %s", type(error).__name__)
            raise FeedbackUnavailable("the feedback database cannot be read now: try again later") from error


def _size(item: Item) -> int:
    """Roughly, in characters."""
    texts: list[Any] = [*item.value.values(), *(subject.text for subject in item.subjects), item.prompt]
    return sum(len(str(text)) for text in texts if text is not None)
