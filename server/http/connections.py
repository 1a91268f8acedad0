"""What one connection may cost before a request is read: header bytes and fields, the time of headers and body, a
minimum rate, and the time in which a reader must take what is sent; and how many connections there may be."""

from __future__ import annotations

import asyncio
import logging
import resource
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.http.error_responses import error_response

logger = logging.getLogger(__name__)

RESERVED_DESCRIPTORS = 128  # for files, the engine and its libraries
MAX_DESCRIPTORS = 65536  # more are not asked for
RATE_SECONDS = 10.0  # in which a body may be slower than the minimum rate


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """The limits of one connection, and `connections`, the number of open ones."""

    header_bytes: int = 65536
    header_fields: int = 100
    header_seconds: float = 10.0
    body_seconds: float = 60.0
    body_rate: int = 1024  # bytes a second
    write_seconds: float = 60.0
    connections: int = 1024


def limited_protocol(limits: ConnectionLimits) -> type[HttpToolsProtocol]:
    """uvicorn's protocol with these limits."""
    return type("LimitedProtocol", (_LimitedProtocol,), {"limits": limits})


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open files as far as it may be; returns how many connections fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = MAX_DESCRIPTORS if hard == unlimited else min(hard, MAX_DESCRIPTORS)
    if soft != unlimited and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return max(1, (MAX_DESCRIPTORS if soft == unlimited else soft) - RESERVED_DESCRIPTORS)


class _LimitedProtocol(HttpToolsProtocol):
    """Counts while it receives. A connection that breaks a limit gets one answer, if it may still get one, and is
    closed. There is a timer only while a request is incomplete, or a reader slow."""

    limits: ConnectionLimits

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._refused = False
        self._in_headers = True  # else in a body
        self._idle = False  # between two requests
        self._pending = 0  # bytes of incomplete headers
        self._received = 0  # of the body
        self._began = 0.0  # when the body did
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._refuse(503, "this server has too many open connections: try again later", "too_many_connections")
            return
        self._arm(self.limits.header_seconds, self._headers_are_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._disarm_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._in_headers:
            self._pending += len(data)
        self._idle = False
        super().data_received(data)
        if self._refused or self.parser is None or self.transport.is_closing():
            return
        if self._in_headers and self._pending > self.limits.header_bytes:
            self._refuse_headers(f"the headers have more than {self.limits.header_bytes} bytes")
        elif self._idle:
            self._disarm()
        elif self._timer is None:
            if self._in_headers:
                self._arm(self.limits.header_seconds, self._headers_are_late)
            else:
                self._arm(1.0, self._check_body)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_headers, self._idle = True, False

    def on_headers_complete(self) -> None:
        if self._refused:
            return
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > self.limits.header_bytes:
            self._refuse_headers(f"the headers have {size} bytes; at most {self.limits.header_bytes} are read")
        elif len(self.headers) > self.limits.header_fields:
            count, most = len(self.headers), self.limits.header_fields
            self._refuse_headers(f"the request has {count} header fields; at most {most} are read")
        else:
            self._in_headers, self._pending, self._received = False, 0, 0
            self._began = self.loop.time()
            self._disarm()
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            self._received += len(body)
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._refused:
            self._in_headers, self._idle = True, True
            super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.limits.write_seconds, self._reader_stalls)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._disarm_writing()

    def _arm(self, seconds: float, late: Callable[[], None]) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _disarm_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _headers_are_late(self) -> None:
        self._timer = None
        self._refuse(408, f"the headers took longer than {self.limits.header_seconds:g} s", "request_timeout")

    def _check_body(self) -> None:
        self._timer = None
        if self._in_headers or self.transport.is_closing():
            return
        seconds = self.loop.time() - self._began
        least = self.limits.body_rate * (seconds - RATE_SECONDS)
        if seconds > self.limits.body_seconds or self._received < least:
            if self.cycle is not None and not self.cycle.response_complete:
                logger.info("a connection is closed: its body was too slow")
            self._cut_off(f"the body took longer than {self.limits.body_seconds:g} s, or came too slowly")
        else:
            self._arm(1.0, self._check_body)

    def _cut_off(self, message: str) -> None:
        """End a request whose body does not come: its task hears that the client has gone."""
        started = self.cycle is not None and self.cycle.response_started
        if started:
            self.transport.abort()
        else:
            self._refuse(408, message, "request_timeout")
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _reader_stalls(self) -> None:
        self._write_timer = None
        logger.info("a connection is closed: its reader took nothing for %g s", self.limits.write_seconds)
        self.transport.abort()

    def _refuse_headers(self, message: str) -> None:
        self._refuse(431, f"{message}: send fewer or shorter ones", "headers_too_large")

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answer with an error and close; nothing more is read."""
        self._refused = True
        self._disarm()
        if self.transport.is_closing():
            return
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()  # an answer to an earlier request is under way
            return
        response = error_response(status, message, code=code)
        response.headers["connection"] = "close"
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}".encode()]
        lines += [name + b": " + value for name, value in response.raw_headers]
        self.transport.write(b"\r\n".join([*lines, b"", bytes(response.body)]))
        self.transport.close()
        self._write_timer = self._write_timer or self.loop.call_later(self.limits.header_seconds, self.transport.abort)
