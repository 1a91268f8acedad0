"""Limits on log lines that clients can cause."""

from __future__ import annotations

import logging
import socket
from pathlib import Path

import pytest

from server.engines.torch.engine import TorchEngine
from server.http.listener import OF_INVALID_REQUESTS
from server.http.throttle import Throttle, ThrottledRecords
from tests.support.serving import engine_fixture, live_server

engine = engine_fixture(slots=1, context=64)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_one_line_per_subject_and_window() -> None:
    clock = Clock()
    throttle = Throttle(seconds=10, clock=clock)
    assert [throttle.admit("a"), throttle.admit("a"), throttle.admit("a"), throttle.admit("b")] == [0, None, None, 2]
    clock.now = 9.9
    assert throttle.admit("a") is None
    clock.now = 10
    assert [throttle.admit("a"), throttle.admit("a")] == [1, None]


def test_many_subjects_are_bounded() -> None:
    clock = Clock()
    throttle = Throttle(seconds=10, subjects=3, clock=clock)
    assert [throttle.admit(str(index)) for index in range(1000)] == [0, 0, 0, *[None] * 997]
    clock.now = 10
    assert throttle.admit("again") == 997


def test_warnings_that_clients_cause_are_throttled(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("tests.throttled")
    throttled = ThrottledRecords()
    logger.addFilter(throttled)
    try:
        for _ in range(50):
            logger.warning("Invalid HTTP request received.")
        logger.error("a fault")
        logger.error("a fault")
    finally:
        logger.removeFilter(throttled)
    assert [record.getMessage() for record in caplog.records] == ["Invalid HTTP request received.", *["a fault"] * 2]


@pytest.mark.slow
def test_what_is_no_http_is_logged_once_in_a_while(
    engine: TorchEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OF_INVALID_REQUESTS, "_throttle", Throttle(clock=Clock()))
    with live_server(engine, tmp_path) as client:
        for _ in range(20):
            with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as connection:
                connection.sendall(b"\0\1\2 no HTTP\r\n\r\n")
                assert connection.recv(4096).startswith(b"HTTP/1.1 400")
    logged = [one for one in caplog.records if (one.name, one.levelname) == ("uvicorn.error", "WARNING")]
    assert [one.getMessage() for one in logged] == ["Invalid HTTP request received."]
