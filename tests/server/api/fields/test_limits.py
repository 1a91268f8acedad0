"""Lengths of fields: what is too long or too many is one error, that is found before each entry is looked at."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from server.api.fields.body import Body
from server.api.native.generate import CompareBody, GenerateBody, ScoreBody
from server.api.openai.requests import ChatBody, CompletionBody
from server.generation.steering_grammar import of_alias, parse_steering
from server.http.answers import encoded
from server.http.error_responses import describe_validation, error_object
from server.http.middleware import MAX_FIELDS, StrictRequest
from steering_vectors.errors import SteeringError

MANY = 50_000
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "a"}]}
COMPLETION = {"model": "demo", "prompt": "a"}
WARM = {"name": "warm"}


@pytest.mark.parametrize(
    ("kind", "body", "field"),
    [
        (CompletionBody, {**COMPLETION, "user": "a" * 1025}, "user"),
        (CompletionBody, {**COMPLETION, "model": "a" * 8193}, "model"),
        (CompletionBody, {**COMPLETION, "stop": ["a" * 1025]}, "stop[0]"),
        (CompletionBody, {**COMPLETION, "stop": [1] * MANY}, "stop[0]"),
        (CompletionBody, {**COMPLETION, "stop_token_ids": ["a"] * MANY}, "stop_token_ids[0]"),
        (CompletionBody, {**COMPLETION, "logit_bias": {str(place): "a" for place in range(1025)}}, "logit_bias"),
        (CompletionBody, {**COMPLETION, "metadata": {str(place): 1 for place in range(17)}}, "metadata"),
        (CompletionBody, {**COMPLETION, "metadata": {"a": "b" * 1025}}, "metadata.a"),
        (CompletionBody, {**COMPLETION, "guided_choice": [1] * MANY}, "guided_choice[0]"),
        (CompletionBody, {**COMPLETION, **{f"x{place}": 0 for place in range(MANY)}}, "x0"),
        (ChatBody, {**CHAT, "messages": [1] * MANY}, "messages[0]"),
        (ChatBody, {**CHAT, "messages": CHAT["messages"] * 4097}, "messages"),
        (GenerateBody, {"prompt": "a", "profile": "a" * 1025}, "profile"),
        (GenerateBody, {"prompt": "a", "steering": {"profiles": [1] * MANY}}, "steering.profiles[0]"),
        (GenerateBody, {"prompt": "a", "steering": {"profiles": [WARM] * 65}}, "steering.profiles"),
        (GenerateBody, {"prompt": "a", "steering": {"profiles": [{**WARM, "layers": [5] * 1025}]}},
         "steering.profiles[0].layers"),
        (GenerateBody, {"prompt": "a", "steering": {"profiles": [{**WARM, "schedule": [1] * MANY}]}},
         "steering.profiles[0].schedule[0]"),
        (CompareBody, {"prompt": "a", "variants": [1] * MANY}, "variants[0]"),
        (ScoreBody, {"prompt": "a", "completions": [{}] * MANY}, "completions[0]"),
    ],
)  # fmt: skip
def test_one_error_is_found(kind: type[Body], body: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as failure:
        kind.model_validate(body)
    (detail,) = failure.value.errors()
    described = describe_validation({**detail, "loc": ("body", *detail["loc"])})
    assert described["param"] == field
    assert len(json.dumps(described)) < 400


def test_a_block_is_named_once() -> None:
    body = GenerateBody.model_validate({"prompt": "a", "steering": {"profiles": [{**WARM, "layers": [5, 5]}]}})
    with pytest.raises(SteeringError, match="layers names a block twice: name each once"):
        body.ask("demo", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a" * 4097, "the steering has 4097 characters; at most 4096 are read"),
        ("+".join(f"a{place}" for place in range(65)), "the steering has more than 64 profiles: use fewer"),
        ("+".join(f"a{place % 64}" for place in range(65)), "the steering has more than 64 profiles: use fewer"),
        ("a+b+a", "profile 'a' occurs twice in one steering"),
    ],
)
def test_a_steering_string_has_limits_wherever_it_is(text: str, message: str) -> None:
    for read in (parse_steering, lambda text: of_alias(f"demo:{text}", "demo")):
        with pytest.raises(SteeringError) as failure:
            read(text)
        assert failure.value.message == message


def test_an_error_shows_no_more_than_a_part_of_a_request() -> None:
    with pytest.raises(SteeringError) as failure:
        parse_steering("?" * 4000)
    assert len(failure.value.message) < 300
    shown = error_object("a" * 10_000, param="b" * 10_000)["error"]
    assert (len(shown["message"]), len(shown["param"] or "")) == (2001, 201)


@pytest.mark.parametrize("space", [b"", b" ", b"\n\t "])
def test_a_large_body_has_few_enough_fields_to_be_parsed(space: bytes) -> None:
    def read(count: int) -> Any:
        fields = b",".join(b'"%06d"%s:0' % (place, space) for place in range(count))
        content = b"{" + fields + b"}" + b" " * 2**18

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": content, "more_body": False}

        return asyncio.run(StrictRequest({"type": "http", "headers": []}, receive).json())

    assert len(read(MAX_FIELDS)) == MAX_FIELDS
    with pytest.raises(json.JSONDecodeError, match="its objects have more than 32768 fields"):
        read(MAX_FIELDS + 1)


@pytest.mark.parametrize("answer", [{}, {"a": [], "b": [1, "ü\n", {"c": [None]}], "d": {"e": 1.5}, "f": "\u2028"}])
def test_a_large_answer_is_encoded_as_any(answer: dict[str, Any]) -> None:
    assert encoded(answer) == JSONResponse(answer).body
