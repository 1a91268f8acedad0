"""Random and mutated request bodies, and the checks that every response must pass: no server error, and errors in the
documented shape.

Valid bodies come from the OpenAPI document, so new routes and fields are covered.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from pydantic import TypeAdapter

from server.http.error_responses import ErrorAnswer

Json = Any
ERROR = TypeAdapter(ErrorAnswer)
Place = tuple[Any, str | int]  # a list or an object, and what stands where in it

KNOWN = ["demo", "demo:warm@0.5", "warm", "warm@0.5+concise@-0.25", "user", "json_object", "^a+$", "1", "Bread is"]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 70),
    st.integers(),
    st.floats(),
    st.sampled_from(KNOWN),
    st.text(st.characters(), max_size=12),
)
VALUES: SearchStrategy[Json] = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KNOWN) | st.text(max_size=4), inner),
    max_leaves=8,
)
LIKELY = st.booleans() | st.integers(0, 20) | st.floats(0, 2) | st.sampled_from(KNOWN)  # values that are often valid
FEW_TOKENS = {"max_tokens": 2}
LATE = "deadline_exceeded"


def examples(document: Mapping[str, Any]) -> dict[str, tuple[Json, list[str]]]:
    """A valid body and the names of all fields of its schema, by path of each POST route."""
    found = {}
    for path, routes in document["paths"].items():
        content = routes.get("post", {}).get("requestBody", {}).get("content", {})
        if "application/json" in content:
            schema = content["application/json"]["schema"]
            objects = list(_objects(schema, document["components"]["schemas"]))
            fields = {name for one in objects for name in one["properties"]}
            valid = schema.get("examples") or objects[0]["examples"]
            found[path] = ({**valid[0], **(FEW_TOKENS if "max_tokens" in fields else {})}, sorted(fields))
    return found


def _objects(schema: Json, named: Mapping[str, Json]) -> Iterator[Json]:
    """The schemas of the objects that a schema allows, alone or in a list."""
    if "$ref" in schema:
        yield named[schema["$ref"].rpartition("/")[2]]
    inside = [schema["items"]] if "items" in schema else []
    for inner in (*schema.get("anyOf", ()), *schema.get("oneOf", ()), *inside):
        yield from _objects(inner, named)


@st.composite
def requests(draw: DrawFn, known: Mapping[str, tuple[Json, list[str]]]) -> tuple[str, bytes]:
    """A path and a body for it."""
    path = draw(st.sampled_from(sorted(known)))
    body, fields = known[path]
    value = draw(VALUES) if draw(st.integers(0, 9)) == 0 else draw(mutated(body, fields))
    return path, json.dumps(value).encode()


@st.composite
def mutated(draw: DrawFn, body: Json, fields: list[str]) -> Json:
    """A body with one to three changes: a value is replaced, removed or repeated, or a field is added."""
    body = copy.deepcopy(body)
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.integers(0, 2)) == 0:
            body[draw(st.sampled_from(fields))] = draw(LIKELY if draw(st.booleans()) else VALUES)
        elif places := list(_places(body)):
            _change(draw, *draw(st.sampled_from(places)))
    return body


def _places(value: Json) -> Iterator[Place]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield value, key
        yield from _places(inner)


def _change(draw: DrawFn, holder: Any, key: Any) -> None:
    kind = draw(st.sampled_from(["replace", "take out", "repeat"]))
    if kind == "take out":
        del holder[key]
    elif kind == "repeat" and isinstance(holder, list):
        holder *= draw(st.integers(2, 40))
    else:
        holder[key] = draw(_near(holder[key]) if draw(st.integers(0, 3)) else VALUES)


def _near(value: Json) -> SearchStrategy[Json]:
    """Values of the same kind, most of them valid."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int | float):
        return st.integers(0, 70) | st.floats(-1, 2)
    return st.sampled_from(KNOWN) | st.text(max_size=12) if isinstance(value, str) else VALUES


def check(response: httpx.Response) -> None:
    """Raise AssertionError for a server error, also in mid-stream, and for an error in another shape. A deadline, which
    the request may have set to a moment, is none."""
    if response.status_code >= 400:
        error = ERROR.validate_python(response.json())["error"]
        late = response.status_code == 504 and error["code"] == LATE
        assert response.status_code < 500 or late, f"{response.status_code}: {response.text}"
    elif response.headers["content-type"].startswith("text/event-stream"):
        for event in _events(response.text):
            if "error" in event:
                error = ERROR.validate_python(event)["error"]
                assert error["type"] != "server_error" or error["code"] == LATE, event


def _events(text: str) -> Iterator[dict[str, Any]]:
    for frame in text.split("\n\n"):
        if frame.startswith("data: {"):
            yield json.loads(frame.removeprefix("data: "))


def as_curl(url: str, path: str, body: bytes) -> str:
    quoted = body.decode().replace("'", "'\\''")
    return f"curl -s {url}{path} -H 'content-type: application/json' -d '{quoted}'"
