"""The listening socket, and how the server stops: /ready says so, what runs gets a grace period, and the rest ends with
an error event."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any, TypeVar

import uvicorn
from starlette.types import ASGIApp

from server.http.connections import ConnectionLimits, limited_protocol
from server.http.throttle import ThrottledRecords
from server.settings import ConfigurationError, Settings

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


@contextmanager
def listening(settings: Settings) -> Iterator[socket.socket]:
    """The listening socket of these settings. A unix socket is removed at the end. Raises ConfigurationError."""
    if settings.uds is None:
        with listen(settings.host, settings.port) as listener:
            yield listener
        return
    with listen_unix(settings.uds, int(settings.uds_mode, 8)) as listener:
        try:
            yield listener
        finally:
            settings.uds.unlink(missing_ok=True)


def listen_unix(path: Path, mode: int) -> socket.socket:
    """A listening unix socket; connecting needs the permission to write to it. One that a server left behind is
    replaced. Raises ConfigurationError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket():
            _remove_abandoned(path)
        mask = os.umask(0o777 & ~mode)  # it never has other permissions
        try:
            listener.bind(str(path))
        finally:
            os.umask(mask)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigurationError(f"cannot listen on --uds {path}: {error.strerror or error}") from error
    return listener


def _remove_abandoned(path: Path) -> None:
    """Remove a unix socket on which no one listens. Raises OSError if someone does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        else:
            raise OSError(errno.EADDRINUSE, "another server listens there")


def tls_options(settings: Settings) -> dict[str, Any]:
    """uvicorn's options for HTTPS, none without a certificate. Raises ConfigurationError if they cannot be used."""
    if settings.ssl_certfile is None:
        return {}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        password = settings.ssl_keyfile_password or ""  # none at all would be asked for on the terminal
        context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile, password)
        if settings.ssl_ca_certs is not None:
            context.load_verify_locations(settings.ssl_ca_certs)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigurationError(
            f"the certificates cannot be used ({error}): check --ssl-certfile, --ssl-keyfile, --ssl-keyfile-password "
            "and --ssl-ca-certs"
        ) from error
    return {
        "ssl_certfile": settings.ssl_certfile,
        "ssl_keyfile": settings.ssl_keyfile,
        "ssl_keyfile_password": settings.ssl_keyfile_password,
        "ssl_ca_certs": settings.ssl_ca_certs,
        "ssl_cert_reqs": ssl.CERT_NONE if settings.ssl_ca_certs is None else ssl.CERT_REQUIRED,
    }


def url_of(host: str, listener: socket.socket, *, tls: bool = False) -> str:
    """The address that clients use; of a unix socket `unix:PATH`."""
    name = listener.getsockname()
    if isinstance(name, str):
        return f"unix:{name}"
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if tls else 'http'}://{shown}:{name[1]}"


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
        tls: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """`tls` has uvicorn's options for HTTPS."""
        config = uvicorn.Config(
            app,
            http=limited_protocol(limits or ConnectionLimits()),
            log_config=None,
            access_log=False,  # server.observability has one
            server_header=False,
            lifespan="on",
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=LAST_WORDS_SECONDS,
            **tls,
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
