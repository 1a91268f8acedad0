"""Checks before a request reaches its route: the size of the body, and its JSON, in which NaN, Infinity, lone
surrogates, deep nesting and duplicate keys are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from jiter import from_json
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.http.error_responses import error_response

PAGE_FILES = "/docs-files"
MAX_FIELDS = 32768  # of all objects of one body: each costs a microsecond or more
FIELDS_COUNTED_FROM = 2**18  # bytes
FIELD = re.compile(rb'"\s*+:')
CLOSE = {"connection": "close"}  # the rest of the body is not read


IN_FLIGHT = "the requests being answered hold as many bytes as this server takes at once: try again later"


class BodyLimit:
    """Refuses bodies of more than `max_bytes`, with or without a Content-Length, and bodies for which `max_in_flight`,
    the bytes of all requests that are being answered, leaves no room."""

    def __init__(self, app: ASGIApp, max_bytes: int, max_in_flight: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_in_flight = max_in_flight
        self._too_large = f"the body is larger than the limit of {max_bytes} bytes"
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        announced = Headers(scope=scope).get("content-length", "0")
        size = int(announced) if announced.isdecimal() and len(announced) < 20 else 0
        if size > self._max_bytes or len(announced) >= 20:
            return await self._refuse(413, self._too_large, "body_too_large")(scope, receive, send)
        if self._in_flight + size > self._max_in_flight:
            return await self._refuse(429, IN_FLIGHT, "overloaded")(scope, receive, send)
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            length = len(message.get("body", b""))
            received += length
            self._in_flight += length
            if received > self._max_bytes:
                raise HTTPException(413, self._too_large, CLOSE)
            if self._in_flight > self._max_in_flight:
                raise HTTPException(429, IN_FLIGHT, CLOSE)
            return message

        try:
            return await self._app(scope, counted, send)
        finally:
            self._in_flight -= received

    def _refuse(self, status: int, message: str, code: str) -> Response:
        response = error_response(status, message, code=code)
        response.headers.update(CLOSE)
        return response


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
