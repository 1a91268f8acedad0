"""Answers as server-sent events, and what happens when the client disconnects: its generations are closed."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic_core import to_json
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from server.http.error_responses import describe_failure

T = TypeVar("T")

DONE = "[DONE]"
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
UNICODE_LINE_ENDS = re.compile("\x85|\u2028|\u2029".encode())  # JSON may hold them, but many clients split lines there


def frame(event: Mapping[str, Any]) -> bytes:
    """One event, which is one `data:` line: JSON escapes newlines."""
    text = to_json(event)
    if not text.isascii():
        text = UNICODE_LINE_ENDS.sub(lambda found: f"\\u{ord(found[0].decode()):04x}".encode(), text)
    return b"data: " + text + b"\n\n"


class EventStreamResponse(StreamingResponse):
    """Streams events; a failure is one more event, and `ends_in` a last one. `close` is awaited when they end or fail,
    and when the client disconnects."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[Mapping[str, Any]],
        *,
        close: Callable[[], Awaitable[None]],
        ends_in: str | None = None,
    ) -> None:
        super().__init__(_frames(events, ends_in), headers=HEADERS)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._close()


async def _frames(events: AsyncIterator[Mapping[str, Any]], ends_in: str | None) -> AsyncIterator[bytes]:
    try:
        async for event in events:
            yield frame(event)
    except Exception as error:
        yield frame(describe_failure(error))
    if ends_in is not None:
        yield f"data: {ends_in}\n\n".encode()


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. If the client disconnects first, cancel it and raise ClientDisconnect."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.create_task(work)
    watcher = asyncio.create_task(disconnected())
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
