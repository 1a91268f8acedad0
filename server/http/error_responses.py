"""Errors as clients see them: OpenAI's error object, for every error and every route.

An error that was not raised on purpose is logged, and answered without its text.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NotRequired

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route
from typing_extensions import TypedDict

from server.http.answers import about
from server.observability import request_record
from steering_vectors.errors import ProfileError, RequestError, TrimtabError

logger = logging.getLogger(__name__)

INTERNAL = "an internal error occurred: see the server's log"
RETRIED = (429, 503)  # statuses with `retry-after`
CLIENT_CLOSED = 499
MAX_MESSAGE = 2000  # characters
MAX_PARAM = 200

OFFLINE_STATUSES: Mapping[type[TrimtabError], int] = {RequestError: 400, ProfileError: 400, TrimtabError: 500}

Detail = Mapping[str, Any]
ErrorType = Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]
TYPES: Mapping[int, ErrorType] = {401: "authentication_error", 429: "rate_limit_error"}


class ErrorDetail(TypedDict):
    """What is wrong and how to fix it."""

    message: Annotated[str, about("What is wrong and how to fix it, for people.")]
    type: Annotated[ErrorType, about("The kind of error, as in OpenAI's API.")]
    param: Annotated[str | None, about("The invalid field, for example `steering.profiles[0].name`.")]
    code: Annotated[str | None, about("A stable identifier for programs.")]


class ErrorAnswer(TypedDict):
    """OpenAI's error object. A stream that fails sends it as its last event, before any `[DONE]`."""

    error: Annotated[ErrorDetail, about("The error.")]
    request_id: NotRequired[Annotated[str, about("The request's id, as in the header `x-request-id` and in the log.")]]


def error_object(message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> ErrorAnswer:
    """The error object, with the id of the request that is being answered, whose record gets the code."""
    message = _cut(message, MAX_MESSAGE)
    param = None if param is None else _cut(param, MAX_PARAM)
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    answer: ErrorAnswer = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    if (record := request_record.current()) is not None:
        record.code = code or kind
        answer["request_id"] = record.id
    return answer


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}…"


def error_response(
    status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 1
) -> JSONResponse:
    """`retry_after` is in seconds, for statuses that tell clients to try again."""
    headers = {"retry-after": str(retry_after)} if status in RETRIED else {}
    if status == 504:  # OpenAI's clients would send it again at once
        headers["x-should-retry"] = "false"
    return JSONResponse(error_object(message, status=status, param=param, code=code), status, headers)


def describe_failure(error: Exception) -> ErrorAnswer:
    """The error object for a failure after the answer has begun."""
    if isinstance(error, TrimtabError):
        return error_object(error.message, status=status_of(error), param=error.param, code=error.code)
    logger.error("a stream failed", exc_info=error)
    return error_object(INTERNAL, status=500, code="internal_error")


def status_of(error: TrimtabError) -> int:
    """A server error has a status; an offline error has that of its nearest class in the table."""
    own: int | None = getattr(error, "status", None)
    return own or next(OFFLINE_STATUSES[kind] for kind in type(error).__mro__ if kind in OFFLINE_STATUSES)


def refusal(error: TrimtabError, retry_after: Callable[[], int]) -> Response:
    """The answer to a request that could not be carried out."""
    status = status_of(error)
    seconds = retry_after() if status == 429 else 1
    return error_response(status, error.message, param=error.param, code=error.code, retry_after=seconds)


def install_error_handlers(app: FastAPI, retry_after: Callable[[], int]) -> None:
    """`retry_after` says when a request that met a full server may be sent again, in seconds."""
    app.state.retry_after = retry_after
    for kind in (TrimtabError, RequestValidationError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, answer_error)


async def answer_error(request: Request, error: Exception) -> Response:
    """The answer to a request whose route raised an error."""
    if isinstance(error, TrimtabError):
        if status_of(error) == 500:
            logger.error("%s", error.message)
        return refusal(error, request.app.state.retry_after)
    if isinstance(error, RequestValidationError):
        return error_response(400, **describe_validation(error.errors()[0], error.body))
    if isinstance(error, ClientDisconnect):
        return Response(status_code=CLIENT_CLOSED)
    if isinstance(error, HTTPException):
        known = {
            404: (f"there is no route {request.url.path!r}", "route_not_found"),
            405: (f"{request.url.path!r} does not accept {request.method}", "method_not_allowed"),
        }
        code = {413: "body_too_large", 429: "overloaded"}.get(error.status_code, "http_error")
        message, code = known.get(error.status_code, (str(error.detail), code))
        seconds = request.app.state.retry_after() if error.status_code == 429 else 1
        response = error_response(error.status_code, message, code=code, retry_after=seconds)
        response.headers.update(error.headers or {})
        if error.status_code == 405 and (allowed := _allowed_methods(request)):
            response.headers["allow"] = allowed
        return response
    response = error_response(500, INTERNAL, code="internal_error")
    if (record := request_record.current()) is not None:  # this one passes no middleware
        response.headers[request_record.HEADER] = record.id
    return response


def _allowed_methods(request: Request) -> str:
    """The methods of all routes of a path, as the application's state has them; Starlette names those of the first."""
    routes: list[Route] = getattr(request.app.state, "routes", [])
    found = [route.methods or () for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return ", ".join(sorted({method for methods in found for method in methods}))


def describe_validation(detail: Detail, body: Any = None) -> dict[str, Any]:
    """Message, param and code of the first validation error."""
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
    """`steering.profiles[0].name`, without what pydantic adds for dictionary keys."""
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
    given_input = detail.get("input")
    long = isinstance(given_input, (str, list, dict)) and len(given_input) > 60
    shown = "…" * 61 if long else json.dumps(given_input, default=str)
    given = f", not {shown}" if "should" in message and ", not " not in message and len(shown) <= 60 else ""
    return f"field {path!r}: {message}{given}" if path else f"the body: {message}{given}"
