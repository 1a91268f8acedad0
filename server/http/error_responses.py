"""Errors as clients see them: OpenAI's error object, whatever went wrong and wherever.

Owns the texts for errors that come from HTTP and validation, and the handlers that turn exceptions into answers. Which
class has which status is the application's to say (`server.app`). Nothing internal leaks: an error that was not raised
on purpose is logged, and answered without its text.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from steering_vectors.errors import TrimtabError

logger = logging.getLogger(__name__)

INTERNAL = "an internal error occurred; the server's log has it"
TYPES = {401: "authentication_error", 429: "rate_limit_error"}
RETRY_SECONDS = {429: "1", 503: "1"}
CLIENT_CLOSED = 499

Detail = Mapping[str, Any]


def error_object(
    message: str, *, status: int = 400, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(status: int, message: str, *, param: str | None = None, code: str | None = None) -> JSONResponse:
    headers = {"retry-after": RETRY_SECONDS[status]} if status in RETRY_SECONDS else None
    return JSONResponse(error_object(message, status=status, param=param, code=code), status, headers)


class ErrorReporter:
    """Turns exceptions into error objects, by the statuses given to classes of `TrimtabError`."""

    def __init__(self, statuses: Mapping[type[TrimtabError], int]) -> None:
        self._statuses = statuses

    def status_of(self, error: TrimtabError) -> int:
        """The status of the nearest class that has one."""
        return next(self._statuses[kind] for kind in type(error).__mro__ if kind in self._statuses)

    def describe(self, error: Exception) -> dict[str, Any]:
        """The error object for a failure after the answer has begun."""
        if isinstance(error, TrimtabError):
            return error_object(error.message, status=self.status_of(error), param=error.param, code=error.code)
        logger.error("a stream failed", exc_info=error)
        return error_object(INTERNAL, status=500, code="internal_error")

    def install(self, app: FastAPI) -> None:
        app.add_exception_handler(TrimtabError, self._on_purpose)
        app.add_exception_handler(RequestValidationError, _on_validation)
        app.add_exception_handler(HTTPException, _on_http)
        app.add_exception_handler(ClientDisconnect, _on_disconnect)
        app.add_exception_handler(Exception, _on_surprise)

    async def _on_purpose(self, _request: Request, error: Exception) -> Response:
        assert isinstance(error, TrimtabError)
        status = self.status_of(error)
        if status == 500:
            logger.error("%s", error.message)
        return error_response(status, error.message, param=error.param, code=error.code)


async def _on_validation(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(400, **describe_validation(error.errors()[0], error.body))


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = {
        404: (f"there is no route {request.url.path!r}", "route_not_found"),
        405: (f"{request.url.path!r} does not take {request.method}", "method_not_allowed"),
    }
    message, code = known.get(error.status_code, (str(error.detail), "http_error"))
    response = error_response(error.status_code, message, code=code)
    response.headers.update(error.headers or {})
    return response


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED)


async def _on_surprise(_request: Request, _error: Exception) -> Response:
    return error_response(500, INTERNAL, code="internal_error")


def describe_validation(detail: Detail, body: Any = None) -> dict[str, Any]:
    """Message, param and code for the first thing that validation found."""
    if isinstance(body, bytes):
        return {"message": "send JSON, with the header Content-Type: application/json", "code": "invalid_json"}
    if detail["type"] == "json_invalid":
        return {"message": f"the body is not valid JSON: {detail['ctx']['error']}", "code": "invalid_json"}
    path = _path(detail["loc"])
    if detail["type"] == "extra_forbidden":
        return {"message": f"unknown field {path!r}", "param": path, "code": "unknown_field"}
    if detail["type"] == "missing":
        message = f"field {path!r} is missing" if path else "the body is missing: send a JSON object"
        return {"message": message, "param": path or None, "code": "missing_field"}
    if detail["type"] == "unsupported_field":
        name = ".".join(part for part in (path, detail["ctx"]["field"]) if part)
        message = f"field {name!r} is not supported: {detail['ctx']['remedy']}"
        return {"message": message, "param": name, "code": "unsupported_field"}
    if detail["type"] == "invalid_steering":
        return {"message": detail["msg"], "param": path, "code": "invalid_steering"}
    return {"message": _sentence(path, detail), "param": path or None, "code": "invalid_value"}


def _path(location: tuple[str | int, ...]) -> str:
    """`steering.profiles[0].name`; what pydantic adds for dictionary keys is left out."""
    path = ""
    for part in location[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part != "[key]":
            path += f".{part}" if path else part
    return path


def _sentence(path: str, detail: Detail) -> str:
    message = str(detail["msg"])
    message = f"{message[0].lower()}{message[1:]}".replace("input should", "it should")
    shown = json.dumps(detail.get("input"), default=str)
    given = f", not {shown}" if "should" in message and ", not " not in message and len(shown) <= 60 else ""
    return f"field {path!r}: {message}{given}" if path else f"the body: {message}{given}"
