"""Checks before a request reaches its route: whether there is room for it, the size of the body, and its JSON, in which
NaN, Infinity, lone surrogates, deep nesting and duplicate keys are refused."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from jiter import from_json
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.http.error_responses import error_response, refusal
from steering_vectors.errors import TrimtabError

PAGE_FILES = "/docs-files"
MAX_FIELDS = 32768  # of all objects of one body: each costs a microsecond or more
FIELDS_COUNTED_FROM = 2**18  # bytes
FIELD = re.compile(rb'"\s*+:')
UPLOAD_PATH = re.compile(r"/profiles/[^/]*", re.DOTALL)
CLOSE = {"connection": "close"}  # the rest of the body is not read


class BytesInFlight:
    """Counts the bytes of the bodies of requests that are being answered, by tenant. One tenant may have the given
    share of the limit; the tenant "", whose requests have no key, may have all of it."""

    def __init__(self, limit: int, share: float) -> None:
        self._limit = limit
        self._of_tenant = limit * share
        self._tenants: Counter[str] = Counter()
        self.total = 0

    def excess(self, tenant: str, more: int = 0) -> str | None:
        """The message if so many more bytes are too many; None if they are not."""
        if self.total + more > self._limit:
            return "the requests being answered hold as many bytes as this server takes at once: try again later"
        if tenant and self._tenants[tenant] + more > self._of_tenant:
            return "the requests of this key hold as many bytes as it may have at once: try again later"
        return None

    def add(self, tenant: str, count: int) -> None:
        self.total += count
        self._tenants[tenant] += count

    def remove(self, tenant: str, count: int) -> None:
        self.total -= count
        self._tenants[tenant] -= count
        if not self._tenants[tenant]:
            del self._tenants[tenant]


class BodyLimit:
    """Refuses bodies of more than `max_bytes`, with or without a Content-Length, and bodies for which those in flight
    leave no room. `retry_after` says when they may be sent again. Uploads have a limit of their own: their routes write
    them to a file as they come."""

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int,
        in_flight: BytesInFlight,
        tenant_of: Callable[[Scope], str],
        retry_after: Callable[[], int],
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._in_flight = in_flight
        self._tenant_of = tenant_of
        self._retry_after = retry_after
        self._too_large = f"the body is larger than the limit of {max_bytes} bytes"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["method"] == "PUT" and UPLOAD_PATH.fullmatch(scope["path"])):
            return await self._app(scope, receive, send)
        announced = Headers(scope=scope).get("content-length", "0")
        size = int(announced) if announced.isdecimal() and len(announced) < 20 else 0
        if size > self._max_bytes or len(announced) >= 20:
            return await self._refuse(413, self._too_large, "body_too_large")(scope, receive, send)
        tenant = self._tenant_of(scope)
        if (problem := self._in_flight.excess(tenant, size)) is not None:
            return await self._refuse(429, problem, "overloaded")(scope, receive, send)
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            length = len(message.get("body", b""))
            received += length
            self._in_flight.add(tenant, length)
            if received > self._max_bytes:
                raise HTTPException(413, self._too_large, CLOSE)
            if (problem := self._in_flight.excess(tenant)) is not None:
                raise HTTPException(429, problem, CLOSE)
            return message

        try:
            return await self._app(scope, counted, send)
        finally:
            self._in_flight.remove(tenant, received)

    def _refuse(self, status: int, message: str, code: str) -> Response:
        response = error_response(status, message, code=code, retry_after=self._retry_after())
        response.headers.update(CLOSE)
        return response


class RoomCheck:
    """Refuses requests to routes that generate before anything is read of their bodies, if there is no room for them.
    `check` raises what they are answered. What a client sends of such a body later is dropped as it comes."""

    def __init__(
        self,
        app: ASGIApp,
        paths: Collection[str],
        check: Callable[[Scope], None],
        retry_after: Callable[[], int],
    ) -> None:
        self._app = app
        self._paths = paths
        self._check = check
        self._retry_after = retry_after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in self._paths:
            try:
                self._check(scope)
            except TrimtabError as error:
                return await refusal(error, self._retry_after)(scope, receive, send)
        return await self._app(scope, receive, send)


class StrictRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        # counting colons is a hundred times as fast, and there are no more fields than those
        many = len(body) > FIELDS_COUNTED_FROM and body.count(b":") > MAX_FIELDS
        if many and sum(1 for _ in FIELD.finditer(body)) > MAX_FIELDS:
            raise json.JSONDecodeError(f"its objects have more than {MAX_FIELDS} fields", "", 0)
        try:
            return from_json(body, allow_inf_nan=False, catch_duplicate_keys=True)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from error


class StrictRoute(APIRoute):
    """A route whose body is read by `StrictRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return handle_strictly
