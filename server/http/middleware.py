"""Checks before a request reaches its route: the size of the body, and its JSON, in which NaN, Infinity, lone
surrogates, deep nesting and duplicate keys are refused."""

from __future__ import annotations

import json
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
MAX_BYTES = 32 * 2**20
TOO_LARGE = f"the body is larger than the limit of {MAX_BYTES} bytes"


class BodyLimit:
    """Refuses bodies of more than `MAX_BYTES`, with or without a Content-Length."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced) > MAX_BYTES:
            response = error_response(413, TOO_LARGE, code="body_too_large")
            response.headers["connection"] = "close"
            return await response(scope, receive, send)
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BYTES:
                raise HTTPException(413, TOO_LARGE)
            return message

        return await self._app(scope, counted, send)


class StrictRequest(Request):
    async def json(self) -> Any:
        try:
            return from_json(await self.body(), allow_inf_nan=False, catch_duplicate_keys=True)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from error


class StrictRoute(APIRoute):
    """A route whose body is read by `StrictRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return handle_strictly
