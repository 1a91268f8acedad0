"""A server that has much to do: deadlines, limits, full queues, shares of keys, and clients that go away."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.access.keys import add_key
from server.engines.torch.constraints.matching import GrammarCompiler
from server.generation import intake
from server.generation.load import Load
from tests.server.http.test_error_responses import error_of
from tests.support.running import HeldEngine, JumpingClock
from tests.support.serving import demo_engine, engine_fixture, live_server, profiles_fixture, until

pytestmark = pytest.mark.slow

engine = engine_fixture(slots=2, context=256, max_queue=8, prefill_chunk=4)
profiles = profiles_fixture("warm")
ENDLESS = {"prompt": "Bread is", "max_tokens": 30, "ignore_eos": True}
COMPLETION = {"model": "demo", **ENDLESS}
GAUGES = (
    "num_requests_running",
    "num_requests_waiting",
    "num_generations_admitted",
    "slots_used",
    "body_bytes_in_flight",
    "answer_values_in_flight",
)


@pytest.fixture
def client(engine: HeldEngine, profiles: Path) -> Iterator[httpx.Client]:
    with live_server(engine, profiles, max_tokens_limit=32, max_n=3, max_timeout_seconds=900) as client:
        yield client
    engine.go()


def gauges(client: httpx.Client, **headers: str) -> dict[str, float]:
    text = client.get("/metrics", headers=headers).text
    return {name: float(re.findall(rf"^trimtab_{name} (\S+)$", text, re.MULTILINE)[0]) for name in GAUGES}


def is_idle(client: httpx.Client, **headers: str) -> bool:
    return not any(gauges(client, **headers).values())


# Deadlines.


def test_a_deadline_ends_what_runs_and_what_waits(
    client: httpx.Client, engine: HeldEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One stream has written text, one request has a slot and no stream, one waits."""
    clock = JumpingClock(monkeypatch)
    before = engine.stats().finished.get("timeout", 0)
    engine.hold(after=6)
    late = {**COMPLETION, "timeout": 100}
    with ThreadPoolExecutor(3) as pool:
        stream = pool.submit(client.post, "/v1/completions", json={**late, "stream": True})
        engine.until_held()
        answers = [pool.submit(client.post, "/generate", json={**ENDLESS, "timeout": 200}) for _ in range(2)]
        until(lambda: sum(state is not None for state in engine._requests.values()) == 3)
        engine.hold(after=2)
        clock.jump(101)
        engine.go()
        lines = stream.result().text.split("\n\n")
        engine.hold()
        engine.until_held()
        clock.jump(101)
        engine.go()
        errors = [error_of(answer.result(), 504) for answer in answers]
    error, done = json.loads(lines[-3].removeprefix("data: ")), lines[-2]
    assert (stream.result().status_code, done) == (200, "data: [DONE]")
    expected = r"the request was not answered within its timeout of 100 s: (\d+) tokens were generated"
    found = re.fullmatch(expected, error["error"]["message"])
    assert found is not None
    assert int(found[1]) > 0
    assert (error["error"]["code"], error["error"]["param"]) == ("deadline_exceeded", "timeout")
    assert '"finish_reason":null' in lines[-4]  # the text was not cut silently: no chunk says that it is complete
    for error, answer in zip(errors, answers, strict=True):
        assert error["message"].startswith("the request was not answered within its timeout of 200 s: ")
        assert (error["type"], error["code"], error["param"]) == ("server_error", "deadline_exceeded", "timeout")
        assert answer.result().headers["x-should-retry"] == "false"
    until(lambda: is_idle(client))
    metrics = client.get("/metrics").text
    assert f'trimtab_generations_total{{finished_reason="timeout"}} {before + 3}.0' in metrics
    assert 'trimtab_requests_total{method="POST",outcome="timeout",route="/v1/completions"} 1.0' in metrics
    assert 'trimtab_requests_total{method="POST",outcome="timeout",route="/generate"} 2.0' in metrics


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/generate", "/compare", "/score"])
def test_every_generating_route_has_a_deadline(
    client: httpx.Client, engine: HeldEngine, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    body: dict[str, Any] = {
        "/v1/chat/completions": {"model": "demo", "messages": messages},
        "/generate": {"messages": messages},
        "/compare": {"prompt": "Bread is", "variants": ["warm", {"profiles": []}]},
        "/score": {"prompt": "Bread is", "completions": [" good", " bad"]},
    }[path]
    clock = JumpingClock(monkeypatch)
    engine.hold()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, path, json={**body, "timeout": 100})
        engine.until_held()
        clock.jump(101)
        engine.go()
        error = error_of(answer.result(), 504)
    expected = "the request was not answered within its timeout of 100 s: it still waited for a slot"
    assert (error["code"], error["message"]) == ("deadline_exceeded", expected)
    until(lambda: is_idle(client))


def test_a_request_without_a_timeout_has_the_servers(
    engine: HeldEngine, profiles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = JumpingClock(monkeypatch)
    with live_server(engine, profiles, default_timeout_seconds=70) as client, ThreadPoolExecutor(1) as pool:
        engine.hold()
        answer = pool.submit(client.post, "/generate", json=ENDLESS)
        engine.until_held()
        clock.jump(71)
        engine.go()
        assert "its timeout of 70 s" in error_of(answer.result(), 504)["message"]


class Blocked:
    """Work that a test holds."""

    def __init__(self, work: Callable[..., Any]) -> None:
        self._work = work
        self._go = threading.Event()
        self.reached = threading.Event()

    def __call__(self, *given: Any, **options: Any) -> Any:
        self.reached.set()
        assert self._go.wait(20), "the test never let it go"
        return self._work(*given, **options)

    def go(self) -> None:
        self._go.set()


@contextmanager
def blocked(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> Iterator[Blocked]:
    work = Blocked(getattr(owner, name))
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda *given, **options: work(*given, **options))
        try:
            yield work
        finally:
            work.go()


def test_a_deadline_holds_while_a_prompt_is_tokenized(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "LONG_TEXT", 0)
    with blocked(monkeypatch, intake, "encode_prompt"):
        error = error_of(client.post("/generate", json={**ENDLESS, "timeout": 0.05}), 504)
        assert error["message"].endswith("its prompt was still being tokenized")
        assert is_idle(client)


def test_a_deadline_holds_while_a_constraint_is_compiled(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    with blocked(monkeypatch, GrammarCompiler, "compile"):
        body = {"prompt": "Bread is", "guided_regex": "[a-z]{3}deadline", "timeout": 0.05}
        error = error_of(client.post("/generate", json=body), 504)
        assert error["message"].endswith("it was still being admitted")
        assert is_idle(client)


# Limits.


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("/v1/completions", {"n": 4}, "n", "n is 4; this server generates at most 3 choices"),
        ("/v1/completions", {"max_tokens": 33}, "max_tokens", "max_tokens is 33; this server generates at most 32 "
         "tokens for a text: ask for fewer"),
        ("/v1/chat/completions", {"max_completion_tokens": 500}, "max_completion_tokens", "max_completion_tokens is "
         "500; this server generates at most 32 tokens for a text: ask for fewer"),
        ("/generate", {"max_tokens": 9999}, "max_tokens", "max_tokens is 9999; this server generates at most 32 "
         "tokens for a text: ask for fewer"),
        ("/generate", {"timeout": 901}, "timeout", "timeout is 901 s; this server takes at most 900 s for a request"),
        ("/generate", {"timeout": 0}, "timeout", "field 'timeout': it should be greater than 0, not 0"),
        ("/v1/completions", {"prompt": ["a"] * 7}, "prompt", "prompt: 7 generations exceed the 6 that one request may "
         "have here: request fewer"),
    ],
)  # fmt: skip
def test_more_than_the_server_allows_is_a_400(
    client: httpx.Client, path: str, body: dict[str, Any], param: str, message: str
) -> None:
    start: dict[str, Any] = {
        "/v1/completions": {"model": "demo", "prompt": "a"},
        "/v1/chat/completions": {"model": "demo", "messages": [{"role": "user", "content": "Hello"}]},
        "/generate": {"prompt": "a"},
    }[path]
    error = error_of(client.post(path, json={**start, **body}), 400)
    assert (error["param"], error["message"]) == (param, message)


def test_what_a_request_leaves_out_keeps_within_the_limit(client: httpx.Client, engine: HeldEngine) -> None:
    """A chat without max_tokens may otherwise go on to the end of the context."""
    body = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "ignore_eos": True}
    answer = client.post("/v1/chat/completions", json=body).json()
    assert answer["usage"]["prompt_tokens"] + 32 < engine.info.context
    assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (32, "length")


# A full queue.


@contextmanager
def connected(client: httpx.Client, content: bytes, headers: str = "", sent: int | None = None) -> Iterator[Any]:
    """A connection that has sent a request to /generate, or `sent` bytes of its body."""
    head = f"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{headers}"
    with socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=20) as connection:
        connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content[:sent])
        yield connection


def test_a_full_server_refuses_before_it_reads_the_body(
    client: httpx.Client, engine: HeldEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = Load.note
    monkeypatch.setattr(Load, "note", lambda self, seconds: note(self, 2.0))  # however fast this machine is
    assert client.post("/generate", json={"prompt": "a", "max_tokens": 1}).status_code == 200
    engine.hold()
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(client.post, "/v1/completions", json={**COMPLETION, "n": n}) for n in (3, 3, 3, 1)]
        until(lambda: len(engine._requests) == 10)
        with connected(client, b"{" + b" " * 999, sent=0) as connection:
            head = connection.recv(65536)
        assert head.startswith(b"HTTP/1.1 429 ")
        assert b"\r\nretry-after: 9\r\n" in head  # 8 wait and 1 more, 2 s each, in 2 slots
        refused = client.post("/generate", content=b"no JSON")
        error = error_of(refused, 429)
        assert error["message"] == "10 generations are running or waiting already: try again later"
        assert (error["code"], refused.headers["retry-after"]) == ("overloaded", "9")
        assert client.get("/v1/models").status_code == 200  # other routes are not concerned
        engine.go()
        assert {one.result().status_code for one in running} == {200}
    until(lambda: is_idle(client))


def keyed(directory: Path, *names: str, **budgets: Any) -> tuple[Path, dict[str, dict[str, str]]]:
    """A file of keys, and the header of each."""
    path = directory / "keys"
    return path, {name: {"authorization": f"Bearer {add_key(path, name, **budgets)[0]}"} for name in names}


def test_no_key_fills_the_queue_or_the_bytes_in_flight(engine: HeldEngine, profiles: Path, tmp_path: Path) -> None:
    file, keys = keyed(tmp_path, "a", "b")
    with live_server(engine, profiles, api_key_file=file, max_bytes_in_flight=20_000) as client:
        engine.hold()
        with ThreadPoolExecutor(3) as pool:
            big = {**COMPLETION, "user": "x" * 1000, "metadata": {str(at): "y" * 1000 for at in range(5)}}
            running = [pool.submit(client.post, "/v1/completions", json={**big, "n": 3}, headers=keys["a"])]
            until(lambda: len(engine._requests) == 3)
            refused = client.post("/v1/completions", json=big, headers=keys["a"])
            assert "the requests of this key hold as many bytes as it may have at once" in refused.text
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            running.append(pool.submit(client.post, "/v1/completions", json={**COMPLETION, "n": 3}, headers=keys["a"]))
            until(lambda: len(engine._requests) == 6)
            refused = client.post("/generate", json=ENDLESS, headers=keys["a"])
            message = "6 generations of this key are running or waiting already, of at most 6: try again later"
            assert error_of(refused, 429)["message"] == message
            running.append(pool.submit(client.post, "/v1/completions", json={**big, "n": 4}, headers=keys["b"]))
            until(lambda: len(engine._requests) == 10)
            engine.go()
            assert [one.result().status_code for one in running] == [200] * 3
        until(lambda: is_idle(client, **keys["b"]))


# Clients that go away.

STAGES = ("body", "tokenizing", "compiling", "queued", "prefilling", "decoding", "streaming")


@pytest.mark.parametrize("stage", STAGES)
def test_a_client_that_leaves_takes_all_it_had_with_it(
    profiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Its slot, its place in the queue, its bytes, its share of the answers' memory, and its key's one request."""
    file, keys = keyed(tmp_path, "a", concurrent_requests=1)
    header = f"authorization: {keys['a']['authorization']}\r\n"
    watcher = {"authorization": f"Bearer {add_key(file, 'watcher')[0]}"}
    body: dict[str, Any] = {**ENDLESS, "steering": "warm@0.1", "projections": True, "stream": stage == "streaming"}
    if stage == "compiling":
        body |= {"guided_regex": "[a-z]{4}left", "ignore_eos": False}
    if stage == "prefilling":
        body["prompt"] = list(range(300, 400))
    content = json.dumps(body).encode()
    with (
        demo_engine(slots=2, context=256, prefill_chunk=4) as engine,
        live_server(engine, profiles, api_key_file=file) as client,
    ):

        def held() -> dict[str, float]:
            return gauges(client, **watcher)

        monkeypatch.setattr(intake, "LONG_TEXT", 0)
        owner, name = (GrammarCompiler, "compile") if stage == "compiling" else (intake, "encode_prompt")
        engine.hold(after={"prefilling": 1, "decoding": 5, "streaming": 5}.get(stage, 0))
        with blocked(monkeypatch, owner, name) as work:
            if stage not in ("tokenizing", "compiling"):
                work.go()
            with connected(client, content, header, sent=20 if stage == "body" else None) as connection:
                if stage == "body":
                    until(lambda: held()["body_bytes_in_flight"] == 20)
                elif stage in ("tokenizing", "compiling"):
                    assert work.reached.wait(20)
                    assert held()["num_generations_admitted"] == 1
                else:
                    engine.until_held()
                    assert held()["answer_values_in_flight"] > 0
                    (state,) = engine._requests.values()
                    assert state is not None
                    assert (state.completion_length > 0) == (stage in ("decoding", "streaming"))
                    assert (state.computed > 0) == (stage != "queued")
                if stage == "streaming":
                    assert b'"delta"' in connection.recv(65536)
                refused = client.post("/generate", json={"prompt": "a"}, headers=keys["a"])
                assert error_of(refused, 429)["code"] == "rate_limit_exceeded"
            until(lambda: not (found := held())["body_bytes_in_flight"] and not found["num_generations_admitted"])
            assert held()["answer_values_in_flight"] == 0
            work.go()
        engine.go()
        until(lambda: is_idle(client, **watcher))
        ended = engine.stats().finished
        assert ended == ({"cancelled": 1} if stage in STAGES[3:] else {})
        assert not engine._requests
        again = client.post("/generate", json={"prompt": "a", "max_tokens": 1}, headers=keys["a"])
        assert again.status_code == 200
