"""Direct routes answer as FastAPI would: each request is sent to both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import pytest
from fastapi import FastAPI, Header
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from pydantic import Field, TypeAdapter
from starlette.responses import Response

from server.api.fields.body import Body
from server.http.direct import DirectRoutes, valid, valid_body
from server.http.error_responses import install_error_handlers
from server.http.middleware import StrictRequest, StrictRoute
from steering_vectors.errors import RequestError


class Thing(Body):
    number: int = Field(ge=0)
    name: str | None = None


Key = Annotated[str, Field(max_length=4)]
THING, KEY = TypeAdapter(Thing), TypeAdapter(Key)


def described(thing: Thing, key: str | None) -> dict[str, object]:
    if thing.number == 13:
        raise RequestError("no luck", param="number")
    return {"number": thing.number, "name": thing.name, "key": key}


async def through_fastapi(body: Thing, key: Annotated[Key | None, Header()] = None) -> dict[str, object]:
    return described(body, key)


async def directly(request: StrictRequest) -> Response:
    key = request.headers.get("key")
    if key is not None:
        valid(key, KEY, "header", "key")
    return JSONResponse(described(await valid_body(request, THING), key))


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    app = FastAPI()
    app.router.route_class = StrictRoute
    app.post("/plain")(through_fastapi)
    app.add_middleware(DirectRoutes, routes={("POST", "/direct"): directly})
    install_error_handlers(app, lambda: 1)
    with TestClient(app) as client:
        yield client


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (b'{"number": 1, "name": "a"}', {}),
        (b'{"number": 1}', {"key": "abcd"}),
        (b'{"number": 1}', {"content-type": "application/json; charset=utf-8"}),
        (b'{"number": 1}', {"content-type": "Application/Problem+JSON"}),
        (b'{"number": 1}', {"content-type": "text/plain"}),
        (b'{"number": 1}', {"content-type": "application/x-json"}),
        (b'{"number": 1}', {"content-type": ""}),
        (b"", {}),
        (b"null", {}),
        (b"[]", {}),
        (b"{", {}),
        (b"\xff", {}),
        (b'{"number": NaN}', {}),
        (b'{"number": 1, "number": 2}', {}),
        (b"{}", {}),
        (b'{"number": -1}', {}),
        (b'{"number": "1"}', {}),
        (b'{"number": 13}', {}),
        (b'{"number": 1, "other": 2}', {}),
        (b'{"number": 1}', {"key": "abcde"}),
    ],
)
def test_it_answers_as_fastapi(client: TestClient, content: bytes, headers: dict[str, str]) -> None:
    given = {"content-type": "application/json", **headers}
    plain = client.post("/plain", content=content, headers=given)
    direct = client.post("/direct", content=content, headers=given)
    assert (direct.status_code, direct.json()) == (plain.status_code, plain.json())
    assert direct.headers == plain.headers


def test_other_methods_and_paths_go_on(client: TestClient) -> None:
    assert client.get("/direct").status_code == client.get("/plain").status_code - 1 == 404
    assert client.post("/direct/").status_code == 404
