"""Daemon threads for work that would hold up the event loop. A process can end while they are still busy."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from server.engines.errors import Overloaded, Unavailable

Result = TypeVar("Result")

CLOSED = "the engine is shut down"
_STACK_SIZES = threading.Lock()  # one size holds for all new threads


class DaemonPool:
    """Runs work in up to `threads` daemon threads, in the order in which it came.

    With `max_waiting`, work is refused while that much waits for a thread. `prepare` runs first in each thread, and
    `stack_bytes` is the size of its stack. Methods may be called from any thread.
    """

    def __init__(
        self,
        threads: int,
        name: str,
        *,
        max_waiting: int | None = None,
        busy: str = "the server is busy: try again later",
        prepare: Callable[[], object] | None = None,
        stack_bytes: int = 0,
    ) -> None:
        self._max_threads = threads
        self._name = name
        self._max_waiting = max_waiting
        self._busy = busy
        self._prepare = prepare
        self._stack_bytes = stack_bytes
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._unfinished = 0
        self._closed = False

    def submit(self, work: Callable[[], Result]) -> Future[Result]:
        """Raises Overloaded if too much waits, Unavailable once this is closed."""
        future: Future[Result] = Future()
        with self._lock:
            if self._closed:
                raise Unavailable(CLOSED)
            waiting = self._unfinished - self._max_threads
            if self._max_waiting is not None and waiting >= self._max_waiting:
                raise Overloaded(self._busy)
            self._unfinished += 1
            if len(self._threads) < min(self._unfinished, self._max_threads):
                self._start()
            self._queue.put((future, work))
        return future

    def add_thread(self) -> None:
        """Allow one thread more, in place of one whose work does not end."""
        with self._lock:
            self._max_threads += 1
            if not self._closed:
                self._start()

    async def run(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, which does not begin any more if the caller is cancelled first."""
        return await asyncio.wrap_future(self.submit(work))

    def close(self) -> None:
        """Begin nothing more, and let the threads end. Does not wait for them."""
        with self._lock:
            self._closed = True
            while not self._queue.empty():
                if (item := self._queue.get()) is not None:
                    item[0].cancel()
            for _ in self._threads:
                self._queue.put(None)

    def _start(self) -> None:
        thread = threading.Thread(target=self._serve, name=f"{self._name}-{len(self._threads)}", daemon=True)
        self._threads.append(thread)
        with _STACK_SIZES:
            before = threading.stack_size(self._stack_bytes)
            try:
                thread.start()
            finally:
                threading.stack_size(before)

    def _serve(self) -> None:
        if self._prepare is not None:
            self._prepare()
        while (item := self._queue.get()) is not None:
            if self._closed:  # taken while `close` empties the queue
                item[0].cancel()
            _carry_out(*item)
            del item  # what it holds is not kept until the next one comes
            with self._lock:
                self._unfinished -= 1


def _carry_out(future: Future[Any], work: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        outcome = work()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(outcome)
