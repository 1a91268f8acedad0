"""Answers as server-sent events, and what happens when the client goes away.

Owns the framing (each event is one `data:` line and a blank one) and the promise that a generation whose client is
gone is closed, streamed or not. Knows nothing of what the events say.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

LAST = "[DONE]"
DONE = f"data: {LAST}\n\n".encode()
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


def frame(event: Mapping[str, Any]) -> bytes:
    """One event. JSON escapes newlines, so it is always one line."""
    text = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


class EventStreamResponse(StreamingResponse):
    """Streams frames; `close` is awaited when they end, fail, or have no one left to read them."""

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncIterator[bytes], *, close: Callable[[], Awaitable[None]]) -> None:
        super().__init__(frames, headers=HEADERS)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._close()


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client disconnects first: then raises ClientDisconnect."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
