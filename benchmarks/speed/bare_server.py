"""`trimtab` without what guards and observes requests: no keys, no limits, no metrics, no access log."""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server import cli
from server.http import listener

LEFT_OUT = frozenset({"ObserveRequests", "SecurityHeaders", "HostCheck", "BodyLimit"})


def strip() -> None:
    """Leave out the middleware, without which nothing is noted either, and the limits of connections. The check of keys
    stays, for routes need the caller; without keys it passes on every request."""
    add = Starlette.add_middleware

    def add_some(app: Starlette, middleware: Any, *given: Any, **options: Any) -> None:
        if middleware.__name__ not in LEFT_OUT:
            add(app, middleware, *given, **options)

    Starlette.add_middleware = add_some  # type: ignore[method-assign, assignment]
    listener.limited_protocol = lambda _limits: HttpToolsProtocol  # type: ignore[assignment]


if __name__ == "__main__":
    strip()
    cli.main()
