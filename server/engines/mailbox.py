"""Carries events from an engine to the event loops that wait for them.

All events of one step reach an event loop in one call.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from server.engines.protocol import Event, Finished


class Mailbox:
    """The events of one `submit`, of all its choices. The engine holds it; `Receiver` is what the caller holds.

    It has one reader, and no lock, limit or tasks to join: it does in half the time what `asyncio.Queue` does.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._events: deque[Event] = deque()
        self._waiting: asyncio.Future[None] | None = None

    def put(self, event: Event) -> None:
        self._events.append(event)
        if self._waiting is not None:
            settle(self._waiting, None, None)

    async def get(self) -> Event:
        while not self._events:
            self._waiting = self.loop.create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        return self._events.popleft()


class Receiver:
    """The receiving end of a mailbox: an `EventStream`.

    `cancel` is called with the ids of the choices that have not finished when the stream is closed or dropped.
    """

    def __init__(self, mailbox: Mailbox, ids: Iterable[str], cancel: Callable[[tuple[str, ...]], object]) -> None:
        self._mailbox = mailbox
        self._cancel = cancel
        self._live = dict.fromkeys(ids)

    def __aiter__(self) -> Receiver:
        return self

    async def __anext__(self) -> Event:
        if not self._live:
            raise StopAsyncIteration
        try:
            event = await self._mailbox.get()
        except BaseException:
            self._close()
            raise
        if isinstance(event, Finished):
            self._live.pop(event.id, None)
        return event

    async def aclose(self) -> None:
        self._close()

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        if self._live:
            left, self._live = tuple(self._live), {}
            self._cancel(left)


class Outbox:
    """The sending end, in the engine's thread: collects a step's events and delivers them."""

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


def settle(waiting: asyncio.Future[Any], value: Any, error: Exception | None) -> None:
    """Give a future its outcome, unless whoever waited for it was cancelled."""
    if waiting.done():
        return
    if error is not None:
        waiting.set_exception(error)
    else:
        waiting.set_result(value)


def _put_all(entries: list[tuple[Mailbox, Event]]) -> None:
    for mailbox, event in entries:
        mailbox.put(event)
