"""What a connection may cost: headers, their time and number, bodies that do not come, readers that do not read."""

from __future__ import annotations

import http.client
import json
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.http.connections import RESERVED_DESCRIPTORS, ConnectionLimits, raise_descriptor_limit
from tests.support.serving import client_fixture, demo_engine, engine_fixture, live_server, profiles_fixture, until

pytestmark = pytest.mark.slow

LIMITS = ConnectionLimits(
    header_bytes=4096,
    header_fields=20,
    header_seconds=0.5,
    body_seconds=2.0,
    body_rate=0,
    write_seconds=0.5,
    connections=8,
)
BODY = {"prompt": "Bread is", "max_tokens": 2}

engine = engine_fixture(slots=2, context=64, max_queue=4)
profiles = profiles_fixture("warm")
client = client_fixture(limits=LIMITS, max_body_bytes=10_000, max_bytes_in_flight=15_000)


@contextmanager
def connected(client: httpx.Client) -> Iterator[socket.socket]:
    with socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=20) as connection:
        yield connection


def read_all(connection: socket.socket) -> tuple[int, str, bytes]:
    """The status and the code of the error that is sent before the connection is closed, and the whole text."""
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"\r\nconnection: close" in head
    return int(head.split()[1]), json.loads(body)["error"]["code"], received


def header(size: int) -> bytes:
    return b"x: " + b"a" * size + b"\r\n"


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"GET /health HTTP/1.1\r\n" + header(5000), 431, "headers_too_large"),  # and it is not complete
        (b"GET /health HTTP/1.1\r\n" + header(5000) + b"\r\n", 431, "headers_too_large"),
        (b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\n\r\n", 431, "headers_too_large"),
        (b"GET /" + b"a" * 5000, 431, "headers_too_large"),
        (b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 21 + b"\r\n", 431, "headers_too_large"),
        (b"", 408, "request_timeout"),
        (b"GET /health HTTP/1.1\r\nx: ", 408, "request_timeout"),
        (b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{", 408, "request_timeout"),
        (b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10001\r\n\r\n", 413, "body_too_large"),
    ],
)
def test_what_is_too_much_or_too_slow_is_answered_and_closed(
    client: httpx.Client, sent: bytes, status: int, code: str
) -> None:
    with connected(client) as connection:
        connection.sendall(sent)
        assert read_all(connection)[:2] == (status, code)
    assert client.post("/generate", json=BODY).status_code == 200


def test_headers_that_keep_coming_are_cut_off(client: httpx.Client) -> None:
    """Each piece is small, and the whole never ends."""
    with connected(client) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nx: ")
        for _ in range(5):
            connection.sendall(b"a" * 1000)
        assert read_all(connection)[:2] == (431, "headers_too_large")


def test_a_chunked_body_that_is_too_large_ends_its_connection(client: httpx.Client) -> None:
    with connected(client) as connection:
        connection.sendall(
            b"POST /generate HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n"
            b"content-type: application/json\r\n\r\n"
        )
        connection.sendall(b"2ee0\r\n" + b" " * 12000 + b"\r\n")
        assert read_all(connection)[:2] == (413, "body_too_large")


def test_connections_that_serve_one_request_after_another_stay(client: httpx.Client) -> None:
    """The time of a request's headers begins with its first byte, not with the answer before."""
    body = json.dumps(BODY).encode()
    connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=20)
    for _ in range(2):
        connection.putrequest("POST", "/generate")
        connection.putheader("content-type", "application/json")
        connection.putheader("content-length", str(len(body)))
        connection.endheaders(body[:5])
        connection.send(body[5:])
        assert connection.getresponse().read().startswith(b'{"id"')
        first = connection.sock
        time.sleep(1.5 * LIMITS.header_seconds)
    assert connection.sock is first
    connection.close()


def test_more_connections_than_may_be_are_refused(client: httpx.Client) -> None:
    client.close()
    held = [socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=20) for _ in range(12)]
    refused = [connection for connection in held if connection.recv(16).startswith(b"HTTP/1.1 503")]
    for connection in held:
        connection.close()
    assert len(refused) == 4
    until(lambda: httpx.get(f"{client.base_url}/health").status_code == 200)


def test_bodies_that_are_answered_count_together(engine: Any, tmp_path: Path) -> None:
    big = {**BODY, "prompt": "a", "ignore_eos": True, "max_tokens": 40, "stop_token_ids": [300] * 1000}
    with live_server(engine, tmp_path, max_bytes_in_flight=6000) as client:
        engine.hold(after=1)
        try:
            with client.stream("POST", "/generate", json={**big, "stream": True}) as first:
                engine.until_held()
                second = client.post("/generate", json=big)
                assert (second.status_code, second.json()["error"]["code"]) == (429, "overloaded")
                assert client.post("/generate", content=iter([b"{" + b" " * 5000]), headers={}).status_code == 429
                engine.go()
                assert "finish_reason" in first.read().decode()
        finally:
            engine.go()
        until(lambda: client.post("/generate", json=big).status_code == 200)


def test_the_limit_of_open_files_is_raised_and_divided() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, before[1]), before[1]))
        fitting = raise_descriptor_limit()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert hard == before[1]
        assert soft == min(hard, 65536)
        assert fitting == soft - RESERVED_DESCRIPTORS
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_reader_that_stalls_is_cut_off_and_its_generation_ends(tmp_path: Path) -> None:
    body = {"model": "demo", "prompt": "a", "logprobs": 20, "max_tokens": 500, "ignore_eos": True, "stream": True}
    content = json.dumps({**body, "n": 40}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}"
    )
    with (
        demo_engine(slots=8, context=512) as engine,
        live_server(engine, tmp_path, limits=LIMITS) as client,
        socket.socket() as connection,
    ):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect((client.base_url.host, client.base_url.port))
        connection.sendall(f"{head}\r\n\r\n".encode() + content)
        until(lambda: engine.stats().finished.get("cancelled", 0) > 0, within=60)
        until(lambda: engine.stats().running == engine.stats().waiting == 0)
