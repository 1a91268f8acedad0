"""The OpenAPI document: what routes declare about their answers, and what holds for all of them.

Owns how an answer, a stream and an error are declared, and the parts that FastAPI does not write by itself. It is
written from declarations alone: nothing here runs while a request is answered. Knows no particular route.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from server.api.fields.answers import Answer, ErrorAnswer
from server.http.error_responses import error_object
from server.http.sse import frame

Json = dict[str, Any]
Responses = dict[int | str, Json]

COMPONENTS = "#/components/schemas/{model}"
STREAMED, EXAMPLE = "x-streamed", "x-example"  # taken out again; FastAPI drops nulls from examples that it can read
DESCRIPTION = """\
Text from a language model, steered while it is written. Errors of every route are OpenAI's error object. Fields that
are not known or not supported are refused by name. A server with `--api-key-file` asks for
`Authorization: Bearer KEY` and answers 401 without. Bodies are JSON of at most 32 MiB (413)."""
TAGS = [
    {"name": "OpenAI", "description": "OpenAI's shapes, with the field `steering` and vLLM's extensions."},
    {"name": "native", "description": "trimtab's own short form."},
    {"name": "steering", "description": "Compare steerings, change one that runs, ask what one would do."},
    {"name": "profiles", "description": "What can be steered by."},
    {"name": "operations", "description": "Whether the server is up, and what it is."},
]
EXAMPLES: Mapping[int, tuple[str, Json]] = {
    400: (
        "The request is not valid: a field is unknown, not supported or out of range, or strengths are not safe.",
        error_object(
            "strength 5 of profile 'warm' is beyond its safe range of ±1.7; "
            "set steering.allow_beyond_safe to true to go beyond it",
            param="strength",
            code="strength_out_of_range",
        ),
    ),
    404: (
        "It names a model, profile or generation that is not there.",
        error_object(
            "profile 'kind' is not served; served are: concise, warm", param="steering", code="profile_not_found"
        ),
    ),
    409: (
        "What it addresses is not in a state that allows it.",
        error_object("the generation has ended", status=409, code="conflict"),
    ),
    429: (
        "The queue is full: try again after the seconds of the header `retry-after`.",
        error_object("1040 requests are running or waiting already: try again later", status=429, code="overloaded"),
    ),
    503: (
        "The model is being loaded, or the server is closing: try again after the seconds of `retry-after`.",
        error_object("the model is being loaded: try again in a moment", status=503, code="loading"),
    ),
}
OTHER_ERRORS: Responses = {
    "default": {
        "description": "Any other error: 401 without a key where one is needed, 413 for a body that is too large, "
        "500 for a fault of the server.",
        "model": ErrorAnswer,
    }
}


def declare(
    answer: type[Answer], *errors: int, stream: type[Answer] | None = None, ends_in: str | None = None
) -> Responses:
    """What a route says in `responses`: its answer, the events it may stream instead, and its errors by status. Every
    stream may fail on its way, with the error as an event; one may end in an event that is not JSON."""
    content: Json = {"application/json": _example(answer.examples[0])}
    if stream is not None:
        content["text/event-stream"] = _stream(stream, ends_in)
    success: Json = {"description": "As asked.", "model": answer, "content": content}
    return {200: success, **{status: _error(status) for status in errors}}


def openapi_document(app: FastAPI) -> Json:
    """The document of an application, with the schemas of streamed events, whole examples and the optional key."""
    if app.openapi_schema is None:
        document = FastAPI.openapi(app)
        for content in _contents(document):
            document["components"]["schemas"] |= content.pop(STREAMED, {})
            if EXAMPLE in content:
                content["example"] = json.loads(content.pop(EXAMPLE))
        key = {"type": "http", "scheme": "bearer", "description": "For servers with --api-key-file."}
        document["components"]["securitySchemes"] = {"key": key}
        document["security"] = [{}, {"key": []}]
    assert app.openapi_schema is not None
    return app.openapi_schema


def _error(status: int) -> Json:
    description, example = EXAMPLES[status]
    return {"description": description, "model": ErrorAnswer, "content": {"application/json": _example(example)}}


def _example(value: Mapping[str, Any]) -> Json:
    return {EXAMPLE: json.dumps(value)}


def _stream(events: type[Answer], ends_in: str | None) -> Json:
    """Server-sent events whose data is this JSON, in the form of OpenAPI 3.2 that FastAPI also writes."""
    forms = [{"$ref": COMPONENTS.format(model=form.__name__)} for form in (events, ErrorAnswer)]
    data: Json = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": forms}}
    if ends_in is not None:
        data = {"anyOf": [data, {"type": "string", "const": ends_in}]}
    _, found = models_json_schema([(events, "serialization")], ref_template=COMPONENTS)
    return {
        "itemSchema": {"type": "object", "required": ["data"], "properties": {"data": data}},
        "example": b"".join(map(frame, events.examples)).decode(),
        STREAMED: found["$defs"],
    }


def _contents(document: Json) -> Iterator[Json]:
    """What each answer of each route holds, by media type."""
    for path in document["paths"].values():
        for operation in path.values():
            for answer in operation["responses"].values():
                yield from answer.get("content", {}).values()
