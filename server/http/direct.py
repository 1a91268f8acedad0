"""Routes that are answered without FastAPI, which takes several times as long as a small request itself: to find its
route, to solve dependencies, and to validate the answer.

Such a route is declared as every other, for the OpenAPI document. Its errors are those of every route.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from server.http.error_responses import answer_error
from server.http.middleware import StrictRequest
from steering_vectors.errors import TrimtabError

T = TypeVar("T")

Handler = Callable[[StrictRequest], Awaitable[Response]]


class DirectRoutes:
    """Answers requests of these methods and paths. All others go on to the application."""

    def __init__(self, app: ASGIApp, routes: Mapping[tuple[str, str], Handler]) -> None:
        self._app = app
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = self._routes.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if handler is None:
            return await self._app(scope, receive, send)
        request = StrictRequest(scope, receive)
        try:
            response = await handler(request)
        except (TrimtabError, RequestValidationError, HTTPException, ClientDisconnect) as error:
            response = await answer_error(request, error)
        return await response(scope, receive, send)


async def valid_body(request: Request, adapter: TypeAdapter[T]) -> T:
    """The body of a request, as FastAPI would validate it. Raises RequestValidationError."""
    content = await request.body()
    if not content:
        raise RequestValidationError([{"type": "missing", "loc": ("body",), "msg": "Field required", "input": None}])
    if not is_json(request.headers.get("content-type", "")):
        raise RequestValidationError([{"type": "no_json", "loc": ("body",), "msg": "no JSON"}], body=content)
    try:
        body = await request.json()
    except json.JSONDecodeError as error:
        detail = {"type": "json_invalid", "loc": ("body", error.pos), "msg": "no JSON", "ctx": {"error": error.msg}}
        raise RequestValidationError([detail]) from error
    return valid(body, adapter, "body")


def valid(value: Any, adapter: TypeAdapter[T], *where: str) -> T:
    """Raises RequestValidationError, whose location begins with `where`."""
    try:
        return adapter.validate_python(value, from_attributes=True)  # as FastAPI does
    except ValidationError as error:
        details = [{**one, "loc": (*where, *one["loc"])} for one in error.errors(include_url=False)]
        raise RequestValidationError(details, body=value) from error


def is_json(content_type: str) -> bool:
    kind, _, subtype = content_type.partition(";")[0].strip().lower().partition("/")
    return kind == "application" and (subtype == "json" or subtype.endswith("+json"))
