"""A streaming client with little overhead: HTTP/1.1 over one persistent connection, with the time of each event.

Events are parsed after the run, so that the client takes little CPU time during it. The client works only with
trimtab's server, which sends one event per chunk.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType
from typing import Any

PREFIX = b"data: "
LAST = b"[DONE]"


@dataclass(slots=True)
class Reply:
    """A reply, with its times in seconds on this process's clock."""

    sent: float
    frames: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def ended(self) -> float:
        return self.frames[-1][0]

    def events(self) -> Iterator[tuple[float, dict[str, Any]]]:
        """Yield events with their times. Raises RuntimeError for an error event."""
        for came, frame in self.frames:
            for line in frame.splitlines():
                if line.startswith(PREFIX) and line != PREFIX + LAST:
                    event = json.loads(line[len(PREFIX) :])
                    if "error" in event:
                        raise RuntimeError(f"a stream ended with an error: {event['error']}")
                    yield came, event


class Connection:
    """A connection for one request after the other: `async with Connection(port) as connection:`. With an API key, each
    request has it."""

    def __init__(self, port: int, key: str = "") -> None:
        self._port = port
        self._authorization = f"authorization: Bearer {key}\r\n" if key else ""

    async def __aenter__(self) -> Connection:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """POST a body and read the whole answer. Returns the status and the body."""
        headers = await self._send(path, body)
        size = headers.partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0]
        return int(headers[9:12]), await self._reader.readexactly(int(size))

    async def stream(self, path: str, body: bytes) -> Reply:
        """POST a body and read the whole reply. Raises RuntimeError for any status other than 200."""
        reply = Reply(perf_counter())
        headers = await self._send(path, body)
        if b" 200 " not in headers.split(b"\r\n", 1)[0] or b"transfer-encoding: chunked" not in headers:
            raise RuntimeError(f"{path}: {headers.decode()}{(await self._reader.read(2000)).decode()}")
        while size := int(await self._reader.readline(), 16):
            reply.frames.append((perf_counter(), (await self._reader.readexactly(size + 2))[:-2]))
        await self._reader.readline()
        return reply

    async def _send(self, path: str, body: bytes) -> bytes:
        """POST a body. Returns the status line and the headers of the answer, in lower case."""
        head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n{self._authorization}"
        self._writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        return (await self._reader.readuntil(b"\r\n\r\n")).lower()
