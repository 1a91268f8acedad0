"""Carrying events from the engine's thread to the event loops that wait for them.

One call into a loop per step delivers the events of all rows. Knows nothing of what the events mean, except which is
the last.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from server.engines.protocol import Event, Finished


class Mailbox:
    """The receiving end of one request: an `EventStream`. `cancel` is called if it is closed before its last event."""

    def __init__(self, cancel: Callable[[], object]) -> None:
        self.loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._cancel = cancel
        self._done = False

    def put(self, event: Event) -> None:
        """Called in the mailbox's loop."""
        self._events.put_nowait(event)

    def __aiter__(self) -> Mailbox:
        return self

    async def __anext__(self) -> Event:
        if self._done:
            raise StopAsyncIteration
        try:
            event = await self._events.get()
        except BaseException:
            self._close()
            raise
        self._done = isinstance(event, Finished)
        return event

    async def aclose(self) -> None:
        self._close()

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        if not self._done:
            self._done = True
            self._cancel()


class Outbox:
    """The sending end, in the engine's thread: collects a step's events and delivers them per loop."""

    def __init__(self) -> None:
        self._pending: list[tuple[Mailbox, Event]] = []

    def put(self, mailbox: Mailbox, event: Event) -> None:
        self._pending.append((mailbox, event))

    def deliver(self) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Mailbox, Event]]] = {}
        for mailbox, event in self._pending:
            by_loop.setdefault(mailbox.loop, []).append((mailbox, event))
        self._pending = []
        for loop, entries in by_loop.items():
            call_in(loop, _put_all, entries)


def call_in(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *given: object) -> None:
    """Call a function in another thread's loop. Nothing happens in a loop that is closed: nobody waits there."""
    with suppress(RuntimeError):  # it may close at any time
        loop.call_soon_threadsafe(function, *given)


def _put_all(entries: list[tuple[Mailbox, Event]]) -> None:
    for mailbox, event in entries:
        mailbox.put(event)
