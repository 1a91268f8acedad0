"""JSON bodies are parsed once, and strictly; `test_malformed` has what is refused over HTTP."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from server.http import middleware
from server.http.middleware import StrictRequest, StrictRoute


def read(body: bytes) -> Any:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return asyncio.run(StrictRequest({"type": "http", "headers": []}, receive).json())


def test_a_body_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    parser = middleware.from_json

    def counted(body: bytes, **options: Any) -> Any:
        parsed.append(body)
        return parser(body, **options)

    def no_other(*_: object, **__: object) -> None:
        raise AssertionError("a second parser reads the body")

    app = FastAPI()
    app.router.route_class = StrictRoute

    @app.post("/echo")
    async def echo(body: dict[str, Any]) -> dict[str, Any]:
        return body

    monkeypatch.setattr(middleware, "from_json", counted)
    with TestClient(app) as client:
        monkeypatch.setattr(json, "loads", no_other)
        answer = client.post("/echo", content=b'{"a": {"b": 1}}', headers={"content-type": "application/json"})
        monkeypatch.undo()
    assert answer.json() == {"a": {"b": 1}}
    assert parsed == [b'{"a": {"b": 1}}']


@pytest.mark.parametrize(
    "body",
    [
        b"NaN",
        b"[Infinity]",
        b'"\\ud800"',
        b'"\\udc00x"',
        b'"\xed\xa0\x80"',
        b'{"a": 1, "a": 1}',
        b'[{"a": {"b": 1, "c": 2, "b": 3}}]',
        b"[" * 300 + b"]" * 300,
        b"1" * 5000,
        b'{"a": 1} x',
    ],
)
def test_what_json_does_not_have_is_refused(body: bytes) -> None:
    with pytest.raises(json.JSONDecodeError):
        read(body)


def test_what_json_has_is_read() -> None:
    body = b'{"a": [1, -2.5e3, "\\ud83d\\ude00", {"a": null}], "b": {"a": true}, "c": 123456789012345678901234567890}'
    expected = {"a": [1, -2500.0, "\U0001f600", {"a": None}], "b": {"a": True}, "c": 123456789012345678901234567890}
    assert read(body) == expected
