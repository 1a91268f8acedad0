"""The listening socket, and how the server stops: it takes no new connections, gives what runs a grace period, and
ends the rest with an error event."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from server.http.throttle import ThrottledRecords
from server.settings import ConfigurationError

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


def run_in_loop(main: Coroutine[Any, Any, None]) -> None:
    """Run to the end, in uvloop's event loop if it is installed, which halves the cost of writing to sockets."""
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    with suppress(ImportError):  # not available on every platform
        import uvloop

        loop_factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main)


class Server(uvicorn.Server):
    """Serves one application. `end` is awaited if something still runs after the grace period."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        end: Callable[[], Awaitable[None]],
        grace: float = GRACE_SECONDS,
    ) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,  # server.observability has one
            server_header=False,
            lifespan="on",
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=round(grace) + LAST_WORDS_SECONDS,
        )
        super().__init__(config)
        logging.getLogger("uvicorn.error").addFilter(OF_INVALID_REQUESTS)
        self._end = end
        self._grace = grace

    def stop(self) -> None:
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end_after_grace())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_after_grace(self) -> None:
        await asyncio.sleep(self._grace)
        await self._end()
