"""The listening socket, and how the server stops: /ready says so, what runs gets a grace period, and the rest ends with
an error event."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from types import FrameType
from typing import Any, TypeVar

import uvicorn
from starlette.types import ASGIApp

from server.http.connections import ConnectionLimits, limited_protocol
from server.http.throttle import ThrottledRecords
from server.settings import ConfigurationError

Result = TypeVar("Result")

GRACE_SECONDS = 6.0  # Docker kills after ten
LAST_WORDS_SECONDS = 2
KEEP_ALIVE_SECONDS = 65  # longer than clients and load balancers, so that they close idle connections first
OF_INVALID_REQUESTS = ThrottledRecords()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, opened before anything is loaded. Raises ConfigurationError if the address is not free."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigurationError(f"cannot listen on host {host!r}: {error.strerror or error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"cannot listen on {host} port {port}: {error.strerror}; stop what runs there or choose another --port"
        ) from error
    return listener


def url_of(host: str, listener: socket.socket) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"


def run_in_loop(main: Coroutine[Any, Any, Result]) -> Result:
    """Run to the end, in uvloop's event loop if it is installed, which halves the cost of writing to sockets."""
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    with suppress(ImportError):  # not available on every platform
        import uvloop

        loop_factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(main)


class Server(uvicorn.Server):
    """Serves one application until `stop` or a signal.

    It then calls `drain` and waits for running requests, while it still answers. After the grace period, or at a second
    signal, it awaits `end`, which ends them, and closes. Stopping by a signal is a normal return.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        end: Callable[[], Awaitable[None]],
        drain: Callable[[], None] = lambda: None,
        grace: float = GRACE_SECONDS,
        limits: ConnectionLimits | None = None,
    ) -> None:
        config = uvicorn.Config(
            app,
            http=limited_protocol(limits or ConnectionLimits()),
            log_config=None,
            access_log=False,  # server.observability has one
            server_header=False,
            lifespan="on",
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=LAST_WORDS_SECONDS,
        )
        super().__init__(config)
        logging.getLogger("uvicorn.error").addFilter(OF_INVALID_REQUESTS)
        self._end = end
        self._drain = drain
        self._grace = grace
        self._at_once = False

    def stop(self, *, at_once: bool = False) -> None:
        """Begin to stop; `at_once` without a grace period."""
        self.should_exit = True
        self._at_once = self._at_once or at_once

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal stops, the second at once, the third without waiting for anything."""
        self.force_exit = self._at_once
        self.stop(at_once=self.should_exit)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._drain()
        loop = asyncio.get_running_loop()
        last = loop.time() + self._grace
        while self.server_state.tasks and loop.time() < last and not self._at_once:
            await asyncio.sleep(0.02)
        if self.server_state.tasks:
            await self._end()
        await super().shutdown(sockets)
