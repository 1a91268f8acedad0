"""One HTTP request over a connection of its own, which may be left or stalled at any point, and what came of it."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal

SMALL_BUFFER = 2048  # bytes that the kernel takes for a reader that stalls
PATIENCE = 300.0  # seconds; a request that takes longer is never answered

Point = Literal["headers", "body", "sent", "events"]


@dataclass(frozen=True, slots=True)
class Leave:
    """Where the client leaves: in the middle of the headers or the body, when all is sent, or after some events.
    `stalled` is for how many seconds it reads nothing before."""

    point: Point
    events: int = 0
    stalled: float = 0.0


@dataclass(frozen=True, slots=True)
class Attempt:
    """A request to send."""

    id: str
    route: str  # the path's template
    method: str
    path: str
    body: bytes
    key: str
    leave: Leave | None = None
    content_type: str = "application/json"


@dataclass(slots=True)
class Answer:
    """What came of an attempt. `left` is what the client saw no end of, by its own doing or because it was cut off. It
    has no status if it was not answered."""

    attempt: Attempt
    status: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)  # of a stream, or the one body
    is_stream: bool = False
    left: bool = False
    sent: bool = False  # all headers
    seconds: float = 0.0

    @property
    def error(self) -> Mapping[str, Any] | None:
        return next((event["error"] for event in self.events if isinstance(event.get("error"), dict)), None)


async def send(port: int, attempt: Attempt, first: Callable[[dict[str, Any]], Awaitable[None]] | None = None) -> Answer:
    """Send it, and read the answer to its end or to where it is left. `first` is awaited with the first event."""
    answer, began = Answer(attempt), perf_counter()
    with suppress(TimeoutError):  # it is unanswered
        async with asyncio.timeout(PATIENCE), _connected(port, attempt.leave) as (reader, writer):
            await _exchange(reader, writer, answer, first)
    answer.seconds = perf_counter() - began
    return answer


async def _exchange(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    answer: Answer,
    first: Callable[[dict[str, Any]], Awaitable[None]] | None,
) -> None:
    attempt, leave = answer.attempt, answer.attempt.leave
    head = _head(attempt)
    if leave is not None and leave.point == "headers":
        writer.write(head[: len(head) // 2])
        answer.left = True
        return
    answer.sent = True
    if leave is not None and leave.point == "body":
        writer.write(head + attempt.body[: len(attempt.body) // 2])
        answer.left = True
        return
    writer.write(head + attempt.body)
    if leave is not None and leave.point == "sent":
        await asyncio.sleep(leave.stalled)
        answer.left = True
        return
    try:
        async for event in _events(reader, answer):
            answer.events.append(event)
            if first is not None and len(answer.events) == 1:
                await first(event)
            if leave is not None and len(answer.events) > leave.events:
                answer.left = True
                return
    except (asyncio.IncompleteReadError, ConnectionError):
        answer.left = True  # cut off


async def _events(reader: asyncio.StreamReader, answer: Answer) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream, without [DONE], or the body of any other answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
    answer.status = int(head[0].split()[1])
    answer.is_stream = headers.get("content-type", "").startswith("text/event-stream")
    if not answer.is_stream:
        body = await reader.readexactly(int(headers["content-length"]))
        with suppress(ValueError):
            if isinstance(found := json.loads(body), dict):
                yield found
        return
    while size := int(await reader.readline(), 16):
        for line in (await reader.readexactly(size + 2)).splitlines():
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                yield json.loads(line[6:])
    await reader.readline()


def _head(attempt: Attempt) -> bytes:
    lines = [
        f"{attempt.method} {attempt.path} HTTP/1.1",
        "host: 127.0.0.1",
        "connection: close",
        f"content-type: {attempt.content_type}",
        f"authorization: Bearer {attempt.key}",
        f"x-request-id: {attempt.id}",
        f"content-length: {len(attempt.body)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


@asynccontextmanager
async def _connected(
    port: int, leave: Leave | None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    own = socket.socket()
    own.setblocking(False)
    if leave is not None and leave.stalled:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
    try:
        await asyncio.get_running_loop().sock_connect(own, ("127.0.0.1", port))
        # a reader that takes nothing must not have asyncio take it for it
        reader, writer = await asyncio.open_connection(
            sock=own, limit=SMALL_BUFFER if leave and leave.stalled else 2**16
        )
    except BaseException:
        own.close()
        raise
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
