"""The one thread that writes to the feedback database. It commits what waits together, so that a disk that syncs a
hundred times a second stores thousands of votes.

Nothing here waits in the event loop, and what waits is bounded.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from server.engines.errors import Overloaded
from server.feedback.items import FeedbackUnavailable
from server.http.throttle import Throttle
from steering_vectors.errors import TrimtabError, first_line

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_WAITING = 4096  # writes
MAX_WAITING_SIZE = 64 * 2**20  # characters of their texts
TOGETHER = 256  # writes of one commit
CLOSE_SECONDS = 5.0
BROKEN = frozenset({"OperationalError", "InterfaceError", "InternalError", "PendingRollbackError"})  # SQLAlchemy's


class Connection(Protocol):
    """What a write gets. Each has a savepoint, so that one that is refused leaves the others alone."""

    def begin_nested(self) -> AbstractContextManager[Any]: ...


@dataclass(slots=True, eq=False)
class Write(Generic[T]):
    """A function that writes over a connection, the size of what it writes, and a callback that gets its result or its
    error after the commit."""

    work: Callable[[Any], T]
    size: int
    done: Callable[[T | None, Exception | None], None]


class Writer:
    """Runs writes in the order in which they come. May be used from any thread."""

    def __init__(
        self,
        writing: Callable[[], AbstractContextManager[Any]],
        *,
        max_waiting: int = MAX_WAITING,
        max_size: int = MAX_WAITING_SIZE,
    ) -> None:
        """`writing` is a transaction that is committed when it is left."""
        self._writing = writing
        self._max_waiting = max_waiting
        self._max_size = max_size
        self._waiting: deque[Write[Any]] = deque()
        self._size = 0
        self._changed = threading.Condition()
        self._closed = False
        self._throttle = Throttle()
        self._thread = threading.Thread(target=self._run, name="trimtab-feedback", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def put(self, write: Write[Any]) -> bool:
        """Queue a write. False if there is no room, or no thread any more."""
        with self._changed:
            full = len(self._waiting) >= self._max_waiting or self._size + write.size > self._max_size
            if full or self._closed:
                return False
            self._waiting.append(write)
            self._size += write.size
            self._changed.notify()
        return True

    async def run(self, work: Callable[[Any], T], size: int = 0) -> T:
        """The result of a write, once it is committed. Raises what it raises, Overloaded if too many wait, and
        FeedbackUnavailable if the database cannot take it."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def resolve(result: T | None, error: Exception | None) -> None:
            if future.done():  # the client is gone
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def done(result: T | None, error: Exception | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(resolve, result, error)

        if not self.put(Write(work, size, done)):
            raise Overloaded("too much feedback waits to be stored: try again later")
        return await future

    def close(self) -> None:
        """Write what waits, for a few seconds, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                batch = [self._waiting.popleft() for _ in range(min(TOGETHER, len(self._waiting)))]
                self._size -= sum(write.size for write in batch)
            if not batch:
                return
            self._commit(batch)

    def _commit(self, batch: Sequence[Write[Any]]) -> None:
        outcomes: list[tuple[Any, Exception | None]] = []
        try:
            with self._writing() as connection:
                outcomes = [_outcome(write, connection) for write in batch]
        except Exception as error:
            if self._throttle.admit(type(error).__name__) is not None:
                logger.error("the feedback database cannot be written: %s", _described(error))
            unavailable = FeedbackUnavailable("the feedback database cannot be written now: try again later")
            outcomes = [(None, unavailable) for _ in batch]
        for write, outcome in zip(batch, outcomes, strict=True):
            try:
                write.done(*outcome)
            except Exception:
                logger.exception("a write of feedback could not be answered")


def _described(error: Exception) -> str:
    """The driver's message, without what was written."""
    name = type(error).__name__
    return f"{name}: {first_line(getattr(error, 'orig', None) or error)}" if name in BROKEN else name


def _outcome(write: Write[T], connection: Connection) -> tuple[T | None, Exception | None]:
    """The result of a write, or its error. What is wrong with the database, and not with this write, is raised."""
    try:
        with connection.begin_nested():
            return write.work(connection), None
    except Exception as error:
        if type(error).__name__ in BROKEN:
            raise
        if not isinstance(error, TrimtabError):
            logger.error("feedback could not be written: %s", _described(error))
        return None, error
