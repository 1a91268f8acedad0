"""Log lines and request ids: what a line has, what it never has, and that nothing is said twice."""

from __future__ import annotations

import io
import json
import logging
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog

from server.observability.logs import formatter
from server.observability.request_record import VALID_ID
from tests.support.serving import client_fixture, engine_fixture, live_server, profiles_fixture, save_profiles, until

SECRET = "the password is swordfish"
engine = engine_fixture(slots=2)
profiles = profiles_fixture("warm", "concise", unit=0.05)
client = client_fixture()


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    """What the server's own loggers write as JSON, line by line."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter("json"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        with caplog.at_level(logging.INFO):
            yield lambda: [one for one in map(json.loads, stream.getvalue().splitlines()) if one["logger"] != "httpx"]
    finally:
        root.removeHandler(handler)


def access(lines: Any) -> list[dict[str, Any]]:
    return [one for one in lines() if one["logger"] == "server.access"]


def test_an_id_that_a_client_sends_is_kept(client: httpx.Client) -> None:
    for name in ("a", "req-1:2/3+4=5._-", "x" * 128):
        assert client.get("/health", headers={"x-request-id": name}).headers["x-request-id"] == name


@pytest.mark.parametrize("name", ["", "x" * 129, "a b", "a\tb", "a,b", "naïve", "{}", 'a"b'])
def test_an_id_that_is_long_or_odd_is_replaced(client: httpx.Client, name: str) -> None:
    answer = client.get("/health", headers=[(b"x-request-id", name.encode("latin-1"))])
    assert re.fullmatch(r"req-[0-9a-f]{24}", answer.headers["x-request-id"])


def test_ids_that_are_made_differ_and_are_valid(client: httpx.Client) -> None:
    made = [client.get("/health").headers["x-request-id"] for _ in range(20)]
    assert len(set(made)) == 20
    assert all(VALID_ID.fullmatch(one) for one in made)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/generate", {"prompt": "a", "colour": 1}, 400),
        ("POST", "/generate", {"prompt": "a", "steering": "kind"}, 404),
        ("GET", "/nothing", None, 404),
        ("GET", "/generate", None, 405),
    ],
)
def test_errors_have_the_id(client: httpx.Client, method: str, path: str, body: Any, status: int) -> None:
    answer = client.request(method, path, json=body, headers={"x-request-id": "mine"})
    assert (answer.status_code, answer.json()["request_id"]) == (status, "mine")
    assert answer.headers.get_list("x-request-id") == ["mine"]


def test_refusals_before_the_routes_have_the_id(engine: Any, profiles: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    with live_server(engine, profiles, api_key_file=keys) as client:
        answer = client.post("/generate", json={}, headers={"x-request-id": "mine"})
        assert (answer.status_code, answer.json()["request_id"]) == (401, "mine")
        key = {"authorization": "Bearer secret", "x-request-id": "mine"}
        answer = client.post("/generate", content=b" " * (2**25 + 1), headers=key)
        assert (answer.status_code, answer.json()["request_id"]) == (413, "mine")
        assert answer.headers["x-request-id"] == "mine"


def test_a_fault_of_the_server_is_logged_and_answered_with_the_id(
    client: httpx.Client, lines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_given: Any) -> Any:
        raise RuntimeError("no such luck")

    monkeypatch.setattr("server.api.profiles.listed", fail)
    with httpx.Client(base_url=client.base_url) as other:  # the server closes its connection
        answer = other.get("/profiles", headers={"x-request-id": "mine"})
    assert (answer.status_code, answer.json()["request_id"]) == (500, "mine")
    assert answer.headers.get_list("x-request-id") == ["mine"]
    until(lambda: len(lines()) == 2)
    first, last = lines()
    assert (first["logger"], first["status"], first["outcome"]) == ("server.access", 500, "server_error")
    assert last["request_id"] == "mine"
    assert "no such luck" in last["exception"]


def test_a_stream_that_fails_has_the_id(client: httpx.Client, lines: Any, engine: Any) -> None:
    body = {"prompt": "Bread is", "max_tokens": 50, "stream": True, "ignore_eos": True}
    engine.hold(after=3)
    with client.stream("POST", "/generate", json=body, headers={"x-request-id": "mine"}) as answer:
        found = answer.iter_lines()
        name = json.loads(next(found).removeprefix("data: "))["id"]
        engine.until_held()
        engine._cancel((name,))
        engine.go()
        *_, last = [json.loads(line.removeprefix("data: ")) for line in found if line]
    assert last["error"]["code"] == "cancelled"
    assert last["request_id"] == "mine"
    until(lambda: len(access(lines)) == 1)
    (line,) = access(lines)
    assert (line["status"], line["outcome"], line["code"]) == (200, "stream_failed", "cancelled")
    assert line["finished"] == {"cancelled": 1}


def test_the_access_log_has_times_tokens_and_steering_and_no_text(client: httpx.Client, lines: Any) -> None:
    body = {"prompt": SECRET, "max_tokens": 6, "steering": "warm@0.5+concise@-0.25", "ignore_eos": True}
    answer = client.post("/generate", json=body, headers={"x-request-id": "mine"})
    until(lambda: len(access(lines)) == 1)
    (line,) = lines()  # and nothing else was said
    assert line == {
        "message": "request",
        "level": "info",
        "logger": "server.access",
        "timestamp": line["timestamp"],
        "request_id": "mine",
        "method": "POST",
        "route": "/generate",
        "status": 200,
        "outcome": "success",
        "client": "127.0.0.1",
        "duration_ms": line["duration_ms"],
        "first_token_ms": line["first_token_ms"],
        "queue_ms": line["queue_ms"],
        "prefill_ms": line["prefill_ms"],
        "decode_ms": line["decode_ms"],
        "generations": 1,
        "prompt_tokens": answer.json()["usage"]["prompt_tokens"],
        "cached_tokens": line["cached_tokens"],
        "completion_tokens": 6,
        "finished": {"length": 1},
        "steering": ["warm@0.5+concise@-0.25"],
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", line["timestamp"])
    phases = line["queue_ms"] + line["prefill_ms"] + line["decode_ms"]
    assert 0 < phases <= line["duration_ms"]
    assert "swordfish" not in json.dumps(lines())


def test_an_error_that_quotes_the_request_does_not_reach_the_log(client: httpx.Client, lines: Any) -> None:
    for body in ({"prompt": SECRET, SECRET: 1}, {"prompt": SECRET, "max_tokens": SECRET}):
        assert SECRET in client.post("/generate", json=body).text
    until(lambda: len(access(lines)) == 2)
    assert [one["code"] for one in lines()] == ["unknown_field", "invalid_value"]
    assert "swordfish" not in json.dumps(lines())


def test_prompts_are_logged_if_that_was_asked_for(engine: Any, profiles: Path, lines: Any) -> None:
    chat = {"model": "demo", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 1}
    with live_server(engine, profiles, log_prompts=True) as client:
        client.post("/generate", json={"prompt": SECRET, "max_tokens": 1}).raise_for_status()
        client.post("/v1/chat/completions", json=chat).raise_for_status()
        until(lambda: len([one for one in access(lines) if "prompts" in one]) == 2)
    text, conversation = [one["prompts"] for one in access(lines) if "prompts" in one]
    assert text == [SECRET]
    assert conversation == [[{"role": "user", "content": SECRET}]]


def test_polled_routes_are_not_logged_at_info(client: httpx.Client, lines: Any) -> None:
    for path in ("/health", "/ready", "/metrics"):
        client.get(path).raise_for_status()
    client.get("/version").raise_for_status()
    until(lambda: len(access(lines)) == 1)
    assert [one["route"] for one in access(lines)] == ["/version"]


def rendered(form: Any, **fields: Any) -> str:
    record = logging.LogRecord("server.x", logging.WARNING, "x.py", 1, "it has %d parts", (3,), None)
    record.__dict__.update(fields)
    return formatter(form).format(record)


def test_text_lines_are_one_line_whatever_they_hold() -> None:
    line = rendered("text", path="/a b\n2026 INFO forged", steering=["warm@1"], status=404, route="/x")
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d WARNING server\.x: it has 3 parts "
        r'path="/a b\\n2026 INFO forged" steering=\["warm@1"\] status=404 route=/x',
        line,
    )


def test_json_lines_are_one_line_whatever_they_hold() -> None:
    with structlog.contextvars.bound_contextvars(request_id="mine"):
        line = rendered("json", path="/a\n\u2028\ud800")
    assert "\n" not in line
    line.encode()
    found = json.loads(line)
    assert (found["message"], found["level"], found["request_id"]) == ("it has 3 parts", "warning", "mine")


@contextmanager
def command(profiles: Path, log: Path, *flags: str) -> Iterator[str]:
    arguments = ["--port", "0", "--threads", "1", "--profiles", str(profiles), *flags]
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "server.cli", "serve", *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line.startswith("trimtab serves"), log.read_text()
            yield line.split()[-1]
        finally:
            process.terminate()
            code = process.wait(20)
    assert code in (0, -signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--engine-process",)], ids=["", "process"])
def test_every_line_of_the_command_is_json_and_none_is_said_twice(
    engine: Any, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    log, directory = tmp_path / "log", tmp_path / "profiles"
    save_profiles(directory, engine.info.identity, "warm", unit=0.05)
    (directory / "broken.safetensors").write_bytes(b"no profile")
    settings = ("--log-format", "json", "--log-level", "debug", *flags)
    with command(directory, log, *settings) as url, httpx.Client(base_url=url, timeout=30) as client:
        body = {"prompt": SECRET, "max_tokens": 2, "steering": "warm@0.5"}
        client.post("/generate", json=body, headers={"x-request-id": "mine"}).raise_for_status()
        client.get("/health").raise_for_status()
    found = [json.loads(line) for line in log.read_text().splitlines()]
    assert all({"message", "level", "logger", "timestamp"} <= one.keys() for one in found)
    assert len([one for one in found if one.get("route") == "/generate"]) == 1
    assert len([one for one in found if one.get("route") == "/health"]) == 1
    assert not [one for one in found if one["logger"] == "uvicorn.access"]
    assert [one for one in found if "broken" in one["message"]]
    assert "swordfish" not in log.read_text()
