"""The check of a container asks the server where it listens."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.docker.files import DOCKER, DOCKERFILE

STATUSES = {"/health": 200, "/ready": 503}


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(STATUSES[self.path])
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


class SixServer(ThreadingHTTPServer):
    address_family = socket.AF_INET6


@pytest.fixture
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        yield from serving(server)


def serving(server: ThreadingHTTPServer) -> Iterator[int]:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()


def check(path: str, **variables: str) -> int:
    """The exit code, also where a proxy is configured that does not exist."""
    environment = {**os.environ, "http_proxy": "http://127.0.0.1:1", "HTTP_PROXY": "http://127.0.0.1:1", **variables}
    command = [sys.executable, str(DOCKER / "healthcheck.py"), path]
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1", "localhost", ""])
def test_it_follows_host_and_port(port: int, host: str) -> None:
    assert check("/health", TRIMTAB_HOST=host, TRIMTAB_PORT=str(port)) == 0


def test_it_follows_an_address_of_version_six() -> None:
    try:
        server = SixServer(("::1", 0), Answers)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with server:
        for port in serving(server):
            for host in ("::", "::1"):
                assert check("/health", TRIMTAB_HOST=host, TRIMTAB_PORT=str(port)) == 0


def test_every_other_answer_fails(port: int) -> None:
    assert check("/ready", TRIMTAB_HOST="0.0.0.0", TRIMTAB_PORT=str(port)) == 1


def test_no_answer_fails() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert check("/health", TRIMTAB_HOST="0.0.0.0", TRIMTAB_PORT=str(unused.getsockname()[1])) == 1


def test_the_image_asks_for_liveness() -> None:
    assert 'CMD ["python", "/app/healthcheck.py", "/health"]' in DOCKERFILE
    assert "COPY docker/healthcheck.py /app/healthcheck.py" in DOCKERFILE
