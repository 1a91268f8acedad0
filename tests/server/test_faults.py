"""Faults from outside of the code: numbers, sockets, names, clocks, disks and other servers. docs/reliability.md lists
them with their promises."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import torch

from benchmarks.common.forked import COMMAND, ForkedCommand, is_ready
from server.access.keys import KeyFileError, add_key, revoke_key
from server.engines.config import EngineConfig
from server.engines.torch.engine import TorchEngine
from server.http.listener import listen
from steering_vectors.errors import ModelError
from steering_vectors.models.loading import LanguageModel, load_model
from steering_vectors.profiles.files import save_profile
from tests.support.full_disk import full_disk
from tests.support.running import HeldEngine
from tests.support.serving import (
    client_fixture,
    demo_engine,
    engine_fixture,
    live_server,
    profiles_fixture,
    random_profile,
    until,
)

pytestmark = pytest.mark.slow

BODY = {"prompt": "Bread is", "max_tokens": 3, "temperature": 0}
ENDLESS = {"prompt": "Bread is", "max_tokens": 120, "ignore_eos": True, "stream": True}
JSON = {"content-type": "application/json"}
MIB = 2**20

engine = engine_fixture(slots=4, context=128, max_queue=4)
profiles = profiles_fixture("warm")
client = client_fixture()


def served(client: httpx.Client) -> bool:
    return client.post("/generate", json=BODY).status_code == 200


@contextmanager
def connected(client: httpx.Client) -> Iterator[socket.socket]:
    with socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=30) as connection:
        yield connection


def request_bytes(body: dict[str, Any], *headers: str) -> bytes:
    content = json.dumps(body).encode()
    lines = ["POST /generate HTTP/1.1", "host: localhost", "content-type: application/json", *headers]
    return "\r\n".join([*lines, f"content-length: {len(content)}", "", ""]).encode() + content


def received(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    found = b""
    with suppress(ConnectionError):
        while data := connection.recv(65536):
            found += data
    return found


def test_weights_that_are_not_finite_are_refused_at_the_start() -> None:
    with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot be served: .*logits differ by inf"):
        HeldEngine(with_nan(load_model("demo", dtype="float32")), EngineConfig(slots=1, context=64))


def test_weights_that_become_nan_fail_each_request_and_leave_the_server_up(tmp_path: Path) -> None:
    """As a fault of the memory would have it."""
    model = load_model("demo", dtype="float32")
    engine = HeldEngine(model, EngineConfig(slots=2, context=64))
    with live_server(engine, tmp_path) as client:
        assert served(client)
        with_nan(model)
        for _ in range(3):
            answer = client.post("/generate", json=BODY)
            assert answer.status_code == 500
            assert (
                answer.json()["error"]["message"] == "the model's logits are not finite; the strength may be too high"
            )
        events = client.post("/generate", json={**BODY, "stream": True}).text.split("\n\n")
        assert ["error" in event for event in events if event] == [False, True]
        assert client.get("/health").status_code == 200
        assert engine.stats().nonfinite_rows == 4
        assert engine.stats().slots_used == 0


def with_nan(model: LanguageModel) -> LanguageModel:
    with torch.no_grad():
        model.model.get_input_embeddings().weight.fill_(float("nan"))
    return model


def test_a_half_closed_connection_is_one_that_was_left(client: httpx.Client, engine: HeldEngine) -> None:
    """The client says that it sends nothing more, and still reads."""
    before = engine.stats().finished.get("cancelled", 0)
    engine.hold(after=3)
    with connected(client) as connection:
        connection.sendall(request_bytes(ENDLESS))
        engine.until_held()
        connection.shutdown(socket.SHUT_WR)
        until(lambda: bool(engine.cancelled))
        engine.go()
        assert b'"finish_reason"' not in received(connection)
    until(lambda: engine.stats().running == 0)
    assert engine.stats().finished["cancelled"] == before + 1
    assert served(client)


@pytest.mark.parametrize(
    "part", [b"", b"POST /generate HT", b"\x16\x03\x01\x02\x00\x01", b"\x00" * 1000, b"\r\n" * 200]
)
def test_a_connection_that_ends_early_or_is_no_http_leaves_nothing(client: httpx.Client, part: bytes) -> None:
    with connected(client) as connection:
        connection.sendall(part)
        connection.shutdown(socket.SHUT_WR)
        assert received(connection)[:12] in (b"", b"HTTP/1.1 400")
    assert served(client)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_100_mb_is_refused_and_not_held(client: httpx.Client, chunked: bool) -> None:
    before = resident()
    sent, answer = 0, b""
    with connected(client) as connection:
        length = "transfer-encoding: chunked" if chunked else f"content-length: {100 * MIB}"
        connection.sendall(f"POST /generate HTTP/1.1\r\nhost: localhost\r\n{length}\r\n\r\n".encode())
        with suppress(ConnectionError):
            for _ in range(100):
                connection.sendall(b"100000\r\n" + b" " * MIB + b"\r\n" if chunked else b" " * MIB)
                sent += MIB
        answer = received(connection)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 413")  # the kernel may drop an answer that is not read
    assert sent < 100 * MIB
    assert resident() - before < 32
    assert served(client)


def resident() -> int:
    """MiB of this process, in which the server runs too."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // MIB


def test_ten_thousand_headers_are_refused(client: httpx.Client) -> None:
    with connected(client) as connection:
        lines = b"".join(b"x-%d: y\r\n" % number for number in range(10_000))
        with suppress(ConnectionError):
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + lines + b"\r\n")
        answer = received(connection)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 431")
    assert served(client)


SECRET = "not for clients"
UPWARD = ["../secret", "..%2Fsecret", "%2e%2e/secret", "..%5Csecret", "%2e%2e%2fsecret.safetensors", "....//secret"]


@pytest.mark.parametrize("root", ["/profiles/", "/docs-files/", "/v1/models/", "/generations/"])
def test_no_path_leaves_the_directory(client: httpx.Client, profiles: Path, root: str) -> None:
    (profiles.parent / "secret").write_text(SECRET)
    (profiles.parent / "secret.safetensors").write_text(SECRET)
    connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=30)
    for path in UPWARD:
        connection.request("GET", root + path)
        answer = connection.getresponse()
        assert answer.status in (404, 405), path
        assert SECRET not in answer.read().decode()
    connection.close()


NAMES = [
    "../warm",
    "/etc/passwd",
    "wärm",
    "warm\n",
    "warm\r\nx-evil: 1",
    "\u202ewarm",
    "😀",
    "a" * 65,
    "WARM",
    "warm\x00",
    ".warm",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_no_profile_can_have_is_refused_wherever_it_is(client: httpx.Client, name: str) -> None:
    answers = [
        client.get(f"/profiles/{quote(name, safe='')}"),
        client.post("/generate", json={**BODY, "profile": name}),
        client.post("/generate", json={**BODY, "steering": {"profiles": [{"name": name, "strength": 1}]}}),
        client.post("/steering/resolve", json={"steering": f"{name}@1"}),
        client.post("/v1/completions", json={**BODY, "model": f"demo:{name}"}),
    ]
    for answer in answers:
        assert answer.status_code in (400, 404)
        assert len(answer.text.splitlines()) == 1  # a newline in a name begins no line
        assert answer.json()["error"]["message"]
    assert served(client)


def test_two_servers_on_one_directory_serve_the_same(profiles: Path) -> None:
    with (
        demo_engine(slots=1, context=64) as first,
        demo_engine(slots=1, context=64) as second,
        live_server(first, profiles) as one,
        live_server(second, profiles) as other,
    ):
        old = None
        for seed in (1, 2):
            save_profile(random_profile(first.info.identity, "common", seed=seed), profiles)
            for each in (one, other):
                until(lambda each=each, old=old: served_version(each, "common") not in (None, old))
            old = served_version(one, "common")
            assert served_version(other, "common") == old
        body = {**BODY, "profile": "common", "strength": 1}
        answers = [each.post("/generate", json=body).json() for each in (one, other)]
        assert answers[0]["text"] == answers[1]["text"]
        assert answers[0]["steering"] == answers[1]["steering"]
        (profiles / "common.safetensors").unlink()
        for each in (one, other):
            until(lambda each=each: served_version(each, "common") is None)


def served_version(client: httpx.Client, name: str) -> str | None:
    found = client.get(f"/profiles/{name}").json()
    return None if "error" in found else str(found["version"])


def test_a_key_file_on_a_full_disk_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    for number in range(5):
        add_key(path, f"k{number}")
    before = path.read_bytes()
    with full_disk(100):
        with pytest.raises(KeyFileError, match="cannot be written"):
            add_key(path, "one-more")
        with pytest.raises(KeyFileError, match="cannot be written"):
            revoke_key(path, "k0")
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".keys.lock", "keys"]


CLOCK = """
import itertools, threading, time

seconds_of, nanoseconds_of, shift = time.time, time.time_ns, 0

def step():
    global shift
    for shift in itertools.cycle((0, 7200, -7200, 400 * 86400, -86400)):
        threading.Event().wait(0.05)

time.time = lambda: seconds_of() + shift
time.time_ns = lambda: nanoseconds_of() + shift * 10**9
threading.Thread(target=step, daemon=True).start()
from server import cli
cli.main()
"""


@contextmanager
def serving(
    directory: Path, *flags: str, code: str = COMMAND, output: Path = Path(os.devnull)
) -> Iterator[tuple[ForkedCommand, httpx.Client]]:
    """A `trimtab serve` that is ready. What it prints goes to a file."""
    with listen("127.0.0.1", 0) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    words = ["serve", "--port", url.rpartition(":")[2], "--profiles", str(directory), *flags]
    environment = {**os.environ, "TRIMTAB_THREADS": "1"}
    with (
        ForkedCommand(words, environment, code=code, output=output, errors=output) as process,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        until(lambda: process.poll() is not None or is_ready(url), within=120)
        yield process, client


def test_a_clock_that_jumps_stops_nothing(tmp_path: Path, engine: TorchEngine) -> None:
    """The wall clock steps by hours and days, twenty times a second. Limits of time are measured by another one."""
    keys = tmp_path / "keys"
    secret, _ = add_key(keys, "a", ("admin",), requests_per_minute=10_000, tokens_per_minute=10_000_000)
    save_profile(random_profile(engine.info.identity, "warm"), tmp_path / "profiles")
    flags = ("--api-key-file", str(keys), "--slots", "2", "--context", "128", "--log-format", "json")
    with serving(tmp_path / "profiles", *flags, code=CLOCK) as (process, client):
        client.headers["authorization"] = f"Bearer {secret}"
        for _ in range(5):
            assert client.post("/generate", json={**BODY, "profile": "warm"}).status_code == 200
        answer = client.post("/generate", json=ENDLESS).text
        assert answer.count('"finish_reason":"length"') == 1
        save_profile(random_profile(engine.info.identity, "fresh", seed=1), tmp_path / "profiles")
        until(lambda: client.get("/profiles/fresh").status_code == 200)
        for line in client.get("/metrics").text.splitlines():
            if line.startswith("trimtab_") and "_seconds_sum" in line:
                assert 0 <= float(line.split()[-1]) < 600, line
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_a_full_disk_for_its_output_stops_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, "--log-level", "debug", output=Path("/dev/full")) as (process, client):
        assert process.poll() is None
        for _ in range(3):
            assert client.post("/generate", json=BODY).status_code == 200
        assert client.post("/generate", content=b"{", headers=JSON).status_code == 400
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_a_collector_of_traces_that_is_gone_stops_nothing(engine: TorchEngine, profiles: Path) -> None:
    pytest.importorskip("opentelemetry.sdk")
    with listen("127.0.0.1", 0) as free:
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}/v1/traces"
    with live_server(engine, profiles, otlp_traces_endpoint=endpoint) as client:
        assert all(served(client) for _ in range(3))
