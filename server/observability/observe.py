"""The middleware that gives each request an id and a record, and counts, logs and traces it when it has ended."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING

import structlog
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.observability.logs import ACCESS
from server.observability.metrics import NO_ROUTE, Metrics
from server.observability.request_record import HEADER, RequestRecord, begin, request_id

if TYPE_CHECKING:
    from server.observability.traces import Traces

QUIET = frozenset({"/health", "/ready", "/metrics"})  # polled; logged at level debug
CLIENT_CLOSED = 499

logger = logging.getLogger(ACCESS)


class ObserveRequests:
    """Must be the outermost middleware, so that it sees every answer. `routes` are the paths of the application: a
    request that is refused before it is routed is still counted for its route."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        routes: Collection[str],
        log_prompts: bool = False,
        traces: Traces | None = None,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = routes
        self._log_prompts = log_prompts
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        client = scope.get("client")
        record = RequestRecord(
            request_id(headers.get(HEADER)),
            scope["method"],
            scope["path"],
            self._metrics,
            client=client[0] if client else None,
            log_prompts=self._log_prompts,
        )
        begin(record)
        structlog.contextvars.bind_contextvars(request_id=record.id)
        span = None if self._traces is None else self._traces.begin(record, headers)

        async def observed(message: Message) -> None:
            kind = message["type"]
            if kind == "http.response.start":
                record.status = message["status"]
                message.setdefault("headers", [])
                message["headers"] = [*message["headers"], (HEADER.encode(), record.id.encode())]
            await send(message)
            if kind == "http.response.body" and not message.get("more_body"):
                record.complete = True

        try:
            await self._app(scope, receive, observed)
        except ClientDisconnect:
            record.status = record.status or CLIENT_CLOSED
            raise
        except Exception:
            record.status, record.code = record.status or 500, record.code or "internal_error"
            raise
        finally:
            record.route = self._route(scope)
            record.end()
            if self._traces is not None and span is not None:
                self._traces.end(record, span)
            level = logging.DEBUG if record.route in QUIET else logging.INFO
            if logger.isEnabledFor(level):
                logger.log(level, "request", extra=record.described())

    def _route(self, scope: Scope) -> str:
        path = getattr(scope.get("route"), "path", None)
        if path is None and scope["path"] in self._routes:
            path = scope["path"]
        return NO_ROUTE if path is None else str(path)
