"""The OpenAPI document: how routes declare their answers, streams and errors, and what FastAPI does not write itself.

Nothing here runs while a request is answered.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import TypeAdapter

from server.http.error_responses import ErrorAnswer, error_object
from server.http.sse import frame

Json = dict[str, Any]
Responses = dict[int | str, Json]

COMPONENTS = "#/components/schemas/{model}"
STREAMED, EXAMPLE = "x-streamed", "x-example"  # taken out again; FastAPI drops nulls from examples that it can read
DESCRIPTION = """\
Text from a language model that is steered while it is generated. All routes answer errors with OpenAI's error object.
Unknown and unsupported fields are refused by name. A server with `--api-key-file` requires
`Authorization: Bearer KEY` and answers 401 without. Bodies are JSON of at most 32 MiB (413)."""
TAGS = [
    {"name": "OpenAI", "description": "OpenAI's API, with the field `steering` and vLLM's extensions."},
    {"name": "native", "description": "trimtab's own short form."},
    {"name": "steering", "description": "Compare steerings, change a running one, and look at what one would do."},
    {"name": "profiles", "description": "The served profiles."},
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
        "The model, profile or generation does not exist.",
        error_object(
            "profile 'kind' is not served; served are: concise, warm", param="steering", code="profile_not_found"
        ),
    ),
    409: ("The generation has already ended.", error_object("the generation has ended", status=409, code="conflict")),
    429: (
        "The queue is full: retry after the seconds in the header `retry-after`.",
        error_object("1040 requests are running or waiting already: try again later", status=429, code="overloaded"),
    ),
    503: (
        "The model is loading or the server is shutting down: retry after the seconds in `retry-after`.",
        error_object("the model is being loaded: try again in a moment", status=503, code="loading"),
    ),
}
GENERATING = (400, 404, 429, 503)  # the errors of routes that run generations
OTHER_ERRORS: Responses = {
    "default": {
        "description": "Any other error: 401 without a required key, 413 for a body that is too large, 500 for a "
        "fault of the server.",
        "model": ErrorAnswer,
    }
}


def declare(
    answer: Any,
    example: Mapping[str, Any],
    *errors: int,
    stream: Any = None,
    events: Sequence[Mapping[str, Any]] = (),
    ends_in: str | None = None,
) -> Responses:
    """A route's `responses`: its answer, the events of its stream with examples, and its errors by status. A stream
    may also send an error as an event, and `ends_in` as a last one that is not JSON."""
    content: Json = {"application/json": _example(example)}
    if stream is not None:
        content["text/event-stream"] = _stream(stream, events, ends_in)
    success: Json = {"description": "Success.", "model": answer, "content": content}
    return {200: success, **{status: _error(status) for status in errors}}


def openapi_document(app: FastAPI) -> Json:
    """The document of an application, with the schemas of streamed events, whole examples and the optional key."""
    if app.openapi_schema is None:
        document = FastAPI.openapi(app)
        schemas = document["components"]["schemas"]
        for content in _contents(document):
            schemas |= content.pop(STREAMED, {})
            if EXAMPLE in content:
                content["example"] = json.loads(content.pop(EXAMPLE))
        for schema in schemas.values():
            if "properties" in schema:
                schema.setdefault("additionalProperties", False)  # answers have no other fields
        key = {"type": "http", "scheme": "bearer", "description": "For servers with --api-key-file."}
        document["components"]["securitySchemes"] = {"key": key}
        document["security"] = [{}, {"key": []}]
    assert app.openapi_schema is not None
    return app.openapi_schema


def _error(status: int) -> Json:
    description, example = ERRORS[status]
    return {"description": description, "model": ErrorAnswer, "content": {"application/json": _example(example)}}


def _example(value: Mapping[str, Any]) -> Json:
    return {EXAMPLE: json.dumps(value)}


def _stream(stream: Any, events: Sequence[Mapping[str, Any]], ends_in: str | None) -> Json:
    """Server-sent events whose data is JSON, in the form of OpenAPI 3.2 that FastAPI also writes."""
    adapter: TypeAdapter[Any] = TypeAdapter(stream | ErrorAnswer)
    schemas, found = TypeAdapter.json_schemas([(EXAMPLE, "serialization", adapter)], ref_template=COMPONENTS)
    schema = schemas[EXAMPLE, "serialization"]
    data: Json = {"type": "string", "contentMediaType": "application/json", "contentSchema": schema}
    if ends_in is not None:
        data = {"anyOf": [data, {"type": "string", "const": ends_in}]}
    return {
        "itemSchema": {"type": "object", "required": ["data"], "properties": {"data": data}},
        "example": b"".join(map(frame, events)).decode(),
        STREAMED: found["$defs"],
    }


def _contents(document: Json) -> Iterator[Json]:
    """The content of every answer of every route, by media type."""
    for path in document["paths"].values():
        for operation in path.values():
            for answer in operation["responses"].values():
                yield from answer.get("content", {}).values()
