"""The errors that only a server has, each with its HTTP status.

    RequestError (steering_vectors.errors)
    ├── UnknownProfile      the request names a profile that is not served
    ├── UnknownModel        it names a model that is not served
    ├── UnknownRoute        it is sent to a route that is not served
    ├── UnknownGeneration   it names a generation that does not exist
    ├── Conflict            the generation it names is in the wrong state
    ├── Overloaded          the queue is full
    └── Unavailable         the engine is starting, closing or restarting
    GenerationFailed        a request was accepted and could not be finished
    DeadlineExceeded        a request was not answered within its timeout

An engine names fields of the protocol in `param`, and never a command-line flag or an HTTP field: the server translates
both, and adds a remedy by `code` (`server.generation.client_errors`).
"""

from __future__ import annotations

from typing import ClassVar

from steering_vectors.errors import RequestError, TrimtabError


class UnknownProfile(RequestError):
    code = "profile_not_found"
    status: ClassVar[int] = 404


class UnknownModel(RequestError):
    code = "model_not_found"
    status: ClassVar[int] = 404


class UnknownRoute(RequestError):
    code = "route_not_found"
    status: ClassVar[int] = 404


class UnknownGeneration(RequestError):
    code = "generation_not_found"
    status: ClassVar[int] = 404


class Conflict(RequestError):
    code = "conflict"
    status: ClassVar[int] = 409


class Overloaded(RequestError):
    code = "overloaded"
    status: ClassVar[int] = 429


class Unavailable(RequestError):
    code = "unavailable"
    status: ClassVar[int] = 503


class GenerationFailed(TrimtabError):
    code = "generation_failed"
    status: ClassVar[int] = 500


class DeadlineExceeded(TrimtabError):
    code = "deadline_exceeded"
    status: ClassVar[int] = 504


def reject(condition: bool, message: str, param: str) -> None:
    """Raise RequestError for the named field if the condition holds."""
    if condition:
        raise RequestError(message, param=param)
