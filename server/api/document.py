"""The OpenAPI document: how routes declare their answers, streams and errors, and what FastAPI does not write itself.

Nothing here runs while a request is answered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import TypeAdapter

from server.http.answers import EXAMPLE
from server.http.error_responses import ErrorAnswer, error_object
from server.http.sse import frame

Json = dict[str, Any]

FILE = "application/octet-stream"
COMPONENTS = "#/components/schemas/{model}"
STREAMED = "x-streamed"  # taken out again
DESCRIPTION = """\
Text from a language model that is steered while it is generated. All routes answer errors with OpenAI's error object.
Unknown and unsupported fields are refused by name. A server with keys requires `Authorization: Bearer KEY`. It answers
401 without one, 403 to a key without the scope that a route needs, and 429 to a key whose budget is used up. All routes
need the scope `generate`, but those that change profiles or show their files and history need `admin`, as jobs do;
feedback needs `feedback` to give it, and `admin` to read or delete it. Bodies are JSON of at most `--max-body-bytes`,
by default 4 MiB (413), except uploads of profiles: files of at most 64 MiB."""
TAGS = [
    {"name": "OpenAI", "description": "OpenAI's API, with the field `steering` and vLLM's extensions."},
    {"name": "native", "description": "trimtab's own short form."},
    {"name": "steering", "description": "Compare steerings, change a running one, and look at what one would do."},
    {"name": "profiles", "description": "The served profiles, their versions and aliases."},
    {"name": "feedback", "description": "What people say about answers; off without `--feedback-database`."},
    {"name": "jobs", "description": "Fits, calibrations and evaluations in the background; off without `--jobs`."},
    {"name": "operations", "description": "The state of the server."},
]
ERRORS: Mapping[int, tuple[str, ErrorAnswer]] = {
    400: (
        "The request is invalid: a field is unknown, unsupported or out of range, or a strength is not safe.",
        error_object(
            "strength 5 of profile 'warm' is beyond its safe range of ±1.7; "
            "set steering.allow_beyond_safe to true to go beyond it",
            param="strength",
            code="strength_out_of_range",
        ),
    ),
    404: (
        "The model, profile, generation, user or job does not exist, or the server keeps no feedback or runs no jobs.",
        error_object(
            "profile 'kind' is not served; served are: concise, warm", param="steering", code="profile_not_found"
        ),
    ),
    409: (
        "The generation has already ended; an idempotency key was used for something else; or the profile or version "
        "cannot be changed: it is in use, comes with trimtab, or the profile directory is read-only; or the job has "
        "ended, or has not.",
        error_object("the generation has ended", status=409, code="conflict"),
    ),
    412: (
        "The profile's version is not what `if-match` or `if-none-match` demand.",
        error_object(
            "profile 'warm' does not exist, which if-match does not allow: look at it again, then repeat the change",
            status=412,
            param="if-match",
            code="precondition_failed",
        ),
    ),
    413: (
        "The file is too large for a profile, or the profile directory would be larger than `--profile-quota-bytes`.",
        error_object("the file has more than 67108864 bytes: it is no profile", status=413, code="body_too_large"),
    ),
    410: (
        "The feedback of this user was deleted.",
        error_object(
            "this user's feedback was deleted: send feedback under another id, or without one",
            status=410,
            param="user",
            code="user_deleted",
        ),
    ),
    429: (
        "The queue or the memory for bodies and answers is full, or the budget or share of the key is used up: retry "
        "after the seconds in the header `retry-after`.",
        error_object("1040 generations are running or waiting already: try again later", status=429, code="overloaded"),
    ),
    503: (
        "The model is loading, the server is shutting down or its engine has failed: retry after "
        "the seconds in `retry-after`.",
        error_object("the model is being loaded: try again in a moment", status=503, code="loading"),
    ),
    504: (
        "The request was not answered within its `timeout`. A stream sends this error as its last event.",
        error_object(
            "the request was not answered within its timeout of 30 s: it still waited for a slot",
            status=504,
            param="timeout",
            code="deadline_exceeded",
        ),
    ),
    507: (
        "The disk of the profile directory is full.",
        error_object(
            "the profile directory cannot take the file (No space left on device): free space on its disk",
            status=507,
            code="disk_full",
        ),
    ),
}
CHANGING = (400, 404, 409, 412, 413, 429, 503, 507)  # the errors of routes that change profiles
GENERATING = (400, 404, 429, 503, 504)  # the errors of routes that run generations
OTHER_ERRORS: dict[int | str, Json] = {
    "default": {
        "description": "Any other error: 401 without a required key, 403 for a key without the scope or for a host "
        "that is not allowed, 413 for a body that is too large, 500 for a fault of the server.",
        "model": ErrorAnswer,
    }
}


def declare(
    answer: Any,
    *errors: int,
    stream: Any = None,
    ends_in: str | None = None,
    creates: bool = False,
    status: int | None = None,
) -> Json:
    """What a route's decorator says about its answer, the events of its stream, and its errors by status. A stream may
    also send an error as an event, and `ends_in` as a last one that is not JSON. One that `creates` may answer 201.
    `status` is that of the answer, if it is not 200."""
    content = {} if stream is None else {"text/event-stream": _stream(stream, ends_in)}
    success: Json = {"description": "Success.", "model": answer, "content": content}
    created = {201: {"description": "Created.", "model": answer}} if creates else {}
    failures = {status: {"description": ERRORS[status][0], "model": ErrorAnswer} for status in errors}
    own = {} if status is None else {"status_code": status}
    return {"response_model": None, "responses": {status or 200: success, **created, **failures}, **own}


def declare_file(*errors: int) -> Json:
    """What a route's decorator says about an answer that is a file."""
    content = {FILE: {"schema": {"type": "string", "format": "binary"}}}
    failures = {status: {"description": ERRORS[status][0], "model": ErrorAnswer} for status in errors}
    return {"response_model": None, "responses": {200: {"description": "Success.", "content": content}, **failures}}


def file_body(description: str) -> Json:
    """What a route's decorator says about a body that is a file."""
    content = {FILE: {"schema": {"type": "string", "format": "binary"}}}
    return {"requestBody": {"description": description, "required": True, "content": content}}


def declare_text(example: str, *errors: int) -> Json:
    """What a route's decorator says about an answer that is plain text."""
    content = {"text/plain": {"schema": {"type": "string"}, "example": example}}
    failures = {status: {"description": ERRORS[status][0], "model": ErrorAnswer} for status in errors}
    return {"response_model": None, "responses": {200: {"description": "Success.", "content": content}, **failures}}


def openapi_document(app: FastAPI) -> Json:
    """The document of an application, with the schemas of streamed events, examples of answers and the optional key."""
    if app.openapi_schema is None:
        document = FastAPI.openapi(app)
        schemas = document["components"]["schemas"]
        operations = [operation for path in document["paths"].values() for operation in path.values()]
        answers = [answer for operation in operations for answer in operation["responses"].items()]
        for _, answer in answers:
            schemas |= answer["content"].get("text/event-stream", {}).pop(STREAMED, {})
        for status, answer in answers:
            body = answer["content"].get("application/json")
            if body is None:  # text
                continue
            if status in ("200", "201"):
                body["example"] = _example(body["schema"], schemas)
            elif status != "default":
                body["example"] = ERRORS[int(status)][1]
        for schema in schemas.values():
            if "properties" in schema:
                schema.setdefault("additionalProperties", False)  # answers have no other fields
            for field in schema.get("properties", {}).values():
                field.pop(EXAMPLE, None)
        key = {"type": "http", "scheme": "bearer", "description": "For servers with keys."}
        document["components"]["securitySchemes"] = {"key": key}
        document["security"] = [{}, {"key": []}]
    assert app.openapi_schema is not None
    return app.openapi_schema


def _stream(stream: Any, ends_in: str | None) -> Json:
    """Server-sent events whose data is JSON, in the form of OpenAPI 3.2 that FastAPI also writes."""
    document = TypeAdapter(stream | ErrorAnswer).json_schema(mode="serialization", ref_template=COMPONENTS)
    schemas = document.pop("$defs")
    *events, _error = document["anyOf"]
    data: Json = {"type": "string", "contentMediaType": "application/json", "contentSchema": document}
    if ends_in is not None:
        data = {"anyOf": [data, {"type": "string", "const": ends_in}]}
    return {
        "itemSchema": {"type": "object", "required": ["data"], "properties": {"data": data}},
        "example": b"".join(frame(_example(event, schemas)) for event in events).decode(),
        STREAMED: schemas,
    }


def _example(schema: Json, schemas: Json) -> Any:
    """A value of a schema: each field's example, the first of given choices, null where it may be null. Fields that may
    be missing are there if they have an example."""
    if EXAMPLE in schema:
        return schema[EXAMPLE]
    if "$ref" in schema:
        return _example(schemas[schema["$ref"].rpartition("/")[2]], schemas)
    if "properties" in schema:
        fields, required = schema["properties"].items(), schema.get("required", ())
        return {name: _example(one, schemas) for name, one in fields if name in required or EXAMPLE in one}
    if "items" in schema:
        return [_example(schema["items"], schemas)]
    return schema.get("const", next(iter(schema.get("enum", ())), None))
