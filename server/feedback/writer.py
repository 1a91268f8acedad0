"""The one thread that writes to the feedback database. It commits together what comes within a short time: one commit
for many votes costs the disk one sync, and the processor few statements.

Nothing here waits in the event loop, and what waits is bounded.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Generic, Protocol, TypeVar

from server.engines.errors import Overloaded
from server.feedback.items import FeedbackUnavailable, Outcome
from server.http.throttle import Throttle
from steering_vectors.errors import TrimtabError, first_line

logger = logging.getLogger(__name__)

T = TypeVar("T")

Work = Callable[[Any, Sequence[Any]], Sequence[Outcome]]  # of a connection and many values

MAX_WAITING = 4096  # writes
MAX_WAITING_SIZE = 64 * 2**20  # characters of their texts
TOGETHER = 256  # writes of one commit
MAX_ROWS = 4096  # of one commit, unless a single write has more
REST = 50  # between two commits, as a multiple of the processor time of the first: many votes share one then
MAX_REST_SECONDS = 0.1
CLOSE_SECONDS = 5.0
BROKEN = frozenset({"OperationalError", "InterfaceError", "InternalError", "PendingRollbackError"})  # SQLAlchemy's


class Connection(Protocol):
    """What a write gets. A savepoint lets one that is refused leave the others alone."""

    def begin_nested(self) -> AbstractContextManager[Any]: ...


@dataclass(slots=True, eq=False)
class Write(Generic[T]):
    """A value, and the function that writes many values like it over a connection. The function raises nothing for one
    value alone, but gives it an error as its outcome. `size` is in characters. After the commit `done` gets the result
    or the error: in the event loop, or in the writer's thread without one."""

    work: Work
    value: Any
    size: int
    done: Callable[[T | None, Exception | None], None]
    loop: asyncio.AbstractEventLoop | None = None
    rows: int = 1


class Writer:
    """Carries out writes in the order in which they come. May be used from any thread."""

    def __init__(
        self,
        writing: Callable[[], AbstractContextManager[Any]],
        *,
        max_waiting: int = MAX_WAITING,
        max_size: int = MAX_WAITING_SIZE,
        rest: float = REST,
        max_rest_seconds: float = MAX_REST_SECONDS,
    ) -> None:
        """`writing` is a transaction that is committed when it is left. After a pause, a write does not wait."""
        self._writing = writing
        self._max_waiting = max_waiting
        self._max_size = max_size
        self._rest = rest
        self._max_rest_seconds = max_rest_seconds
        self._waiting: deque[Write[Any]] = deque()
        self._size = 0
        self._changed = threading.Condition()
        self._idle = False  # the thread waits for a first write
        self._next = 0.0  # when it may commit again
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
            if self._idle or len(self._waiting) == TOGETHER:
                self._changed.notify()
        return True

    async def run(self, work: Callable[[Any], T], size: int = 0) -> T:
        """The result of a function over a connection, which is undone if it raises. As `submit`, raises what it
        raises."""
        result: T = await self.submit(_alone, work, size)
        return result

    async def submit(self, work: Work, value: Any, size: int = 0, rows: int = 1) -> Any:
        """The result of a value, once it is committed. Raises its error, Overloaded if too much waits, and
        FeedbackUnavailable if the database cannot take it."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def done(result: Any, error: Exception | None) -> None:
            if future.done():  # the client is gone
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        if not self.put(Write(work, value, size, done, loop, rows)):
            raise Overloaded("too much feedback waits to be stored: try again later")
        return await future

    def close(self) -> None:
        """Write what waits, for a few seconds, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while batch := self._gathered():
            began, spent = time.monotonic(), time.thread_time()
            outcomes = self._committed(batch)
            _answer(batch, outcomes)
            spent = time.thread_time() - spent
            self._next = began + min(self._rest * spent, self._max_rest_seconds)

    def _gathered(self) -> list[Write[Any]]:
        """What is committed next; empty at the end."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._idle = True
                self._changed.wait()
            self._idle = False
            while len(self._waiting) < TOGETHER and not self._closed:
                left = self._next - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            batch: list[Write[Any]] = []
            rows = 0
            while self._waiting and len(batch) < TOGETHER and (not batch or rows + self._waiting[0].rows <= MAX_ROWS):
                batch.append(self._waiting.popleft())
                rows += batch[-1].rows
                self._size -= batch[-1].size
        return batch

    def _committed(self, batch: Sequence[Write[Any]]) -> Sequence[Outcome]:
        try:
            try:
                with self._writing() as connection:
                    return _together(connection, batch)
            except Exception as error:
                if type(error).__name__ in BROKEN:
                    raise
                with self._writing() as connection:  # only the one that raises is refused
                    return [_outcome(connection, write.work, write.value) for write in batch]
        except Exception as error:
            if self._throttle.admit(type(error).__name__) is not None:
                logger.error("the feedback database cannot be written: %s", _described(error))
            unavailable = FeedbackUnavailable("the feedback database cannot be written now: try again later")
            return [(None, unavailable) for _ in batch]


def _together(connection: Connection, batch: Sequence[Write[Any]]) -> list[Outcome]:
    """Neighbours with the same function are written by one call of it."""
    outcomes: list[Outcome] = []
    for work, writes in groupby(batch, key=lambda write: write.work):
        outcomes += work(connection, [write.value for write in writes])
    return outcomes


def _alone(connection: Connection, works: Sequence[Callable[[Any], Any]]) -> list[Outcome]:
    """The `Work` of values that are functions themselves."""
    return [_outcome(connection, lambda inner, one: [(one[0](inner), None)], work) for work in works]


def _outcome(connection: Connection, work: Work, value: Any) -> Outcome:
    """What comes of one value, which is undone if it raises. What is wrong with the database, and not with this value,
    is raised."""
    try:
        with connection.begin_nested():
            (outcome,) = work(connection, [value])
            return outcome
    except Exception as error:
        if type(error).__name__ in BROKEN:
            raise
        if not isinstance(error, TrimtabError):
            logger.error("feedback could not be written: %s", _described(error))
        return None, error


def _answer(batch: Sequence[Write[Any]], outcomes: Sequence[Outcome]) -> None:
    """Hand out the outcomes: to each event loop in one call, which wakes it once."""
    of_loops: dict[asyncio.AbstractEventLoop | None, list[tuple[Write[Any], Outcome]]] = defaultdict(list)
    for write, outcome in zip(batch, outcomes, strict=True):
        of_loops[write.loop].append((write, outcome))
    for loop, answers in of_loops.items():
        if loop is None:
            _hand_out(answers)
        else:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_hand_out, answers)


def _hand_out(answers: Sequence[tuple[Write[Any], Outcome]]) -> None:
    for write, outcome in answers:
        try:
            write.done(*outcome)
        except Exception:
            logger.exception("a write of feedback could not be answered")


def _described(error: Exception) -> str:
    """The driver's message, without what was written."""
    name = type(error).__name__
    return f"{name}: {first_line(getattr(error, 'orig', None) or error)}" if name in BROKEN else name
