"""A live server: OpenAI's client, many streams at once, clients that go away, profiles that come, and the command."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from benchmarks.common.forked import ForkedCommand
from server import cli
from server.app import create_app
from server.engines.config import EngineConfig
from server.engines.torch.engine import TorchEngine
from server.profiles.registry import POLL_SECONDS
from server.settings import Settings
from steering_vectors.profiles.files import save_profile
from tests.support.running import HeldEngine
from tests.support.serving import demo_engine, live_server, random_profile, save_profiles, until

pytestmark = pytest.mark.slow

MESSAGES: list[Any] = [{"role": "user", "content": "How do I bake bread?"}]
NAMES = [f"p{index}" for index in range(8)]
ENDLESS = {"prompt": "Bread is", "max_tokens": 500, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine() -> Iterator[TorchEngine]:
    with demo_engine(slots=8) as engine:
        yield engine


@pytest.fixture(scope="module")
def profiles(engine: TorchEngine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("profiles")
    save_profiles(directory, engine.info.identity, *NAMES, unit=0.05)
    return directory


@pytest.fixture(scope="module")
def client(engine: TorchEngine, profiles: Path) -> Iterator[httpx.Client]:
    with live_server(engine, profiles) as client:
        yield client


def idle(engine: TorchEngine) -> bool:
    stats = engine.stats()
    return stats.running == stats.waiting == 0


def test_openais_client(client: httpx.Client) -> None:
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as remote:
        whole = remote.chat.completions.create(
            model="demo", messages=MESSAGES, temperature=0, extra_body={"steering": "p1@0.5"}
        )
        text = whole.choices[0].message.content
        assert whole.model_extra is not None
        assert whole.model_extra["steering"][0]["name"] == "p1"
        stream = remote.chat.completions.create(
            model="demo:p1@0.5",
            messages=MESSAGES,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        parts = list(stream)
        assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == text
        usage = parts[-1].usage
        assert usage is not None
        assert whole.usage is not None
        assert usage.total_tokens == whole.usage.total_tokens
        assert usage.prompt_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1  # the second asking
        assert [model.id for model in remote.models.list()][:2] == ["demo", "demo:p0"]
        completion = remote.completions.create(model="demo", prompt=["Bread is", "Tea is"], max_tokens=4)
        assert [choice.index for choice in completion.choices] == [0, 1]
        with pytest.raises(openai.NotFoundError, match="profile 'kind' is not served"):
            remote.chat.completions.create(model="demo:kind", messages=MESSAGES)
        with pytest.raises(openai.BadRequestError, match="unknown field 'temprature'"):
            remote.chat.completions.create(model="demo", messages=MESSAGES, extra_body={"temprature": 1})


def test_openais_async_client(client: httpx.Client) -> None:
    async def scenario() -> None:
        async with openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as remote:
            whole = await remote.chat.completions.create(model="demo:p2", messages=MESSAGES, temperature=0)
            stream = await remote.chat.completions.create(
                model="demo:p2", messages=MESSAGES, temperature=0, stream=True
            )
            text = "".join([part.choices[0].delta.content or "" async for part in stream])
            assert text == whole.choices[0].message.content

    asyncio.run(scenario())


def test_64_streams_over_8_profiles_all_end(client: httpx.Client, engine: TorchEngine) -> None:
    async def stream(remote: httpx.AsyncClient, index: int) -> str:
        body = {"model": f"demo:{NAMES[index % 8]}", "messages": MESSAGES, "max_tokens": 8, "stream": True}
        response = await remote.post("/v1/chat/completions", json=body)
        assert response.status_code == 200
        return response.text

    async def scenario() -> list[str]:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=client.base_url, timeout=60, limits=limits) as remote:
            return await asyncio.gather(*(stream(remote, index) for index in range(64)))

    for index, text in enumerate(asyncio.run(scenario())):
        assert text.endswith("data: [DONE]\n\n")
        assert text.count('"finish_reason":"length"') + text.count('"finish_reason":"stop"') == 1
        assert f'"name":"{NAMES[index % 8]}"' in text
        assert '"error"' not in text
    until(lambda: idle(engine))


def test_clients_killed_in_mid_stream_leak_no_slot(client: httpx.Client, engine: TorchEngine) -> None:
    async def stream(remote: httpx.AsyncClient, index: int) -> bool:
        short = {"max_tokens": 8} if index % 2 else {}
        body = {**ENDLESS, "profile": NAMES[index % 8], "stream": True, **short}
        async with remote.stream("POST", "/generate", json=body) as response:
            async for line in response.aiter_lines():
                if index % 2 == 0 and line.startswith("data: "):
                    return False
                if '"finish_reason"' in line:
                    return True
        return False

    async def scenario() -> list[bool]:
        limits = httpx.Limits(max_connections=32)
        async with httpx.AsyncClient(base_url=client.base_url, timeout=60, limits=limits) as remote:
            return await asyncio.gather(*(stream(remote, index) for index in range(32)))

    before = engine.stats().finished.get("cancelled", 0)
    assert asyncio.run(scenario()) == [index % 2 == 1 for index in range(32)]
    until(lambda: idle(engine))
    assert engine.stats().finished["cancelled"] == before + 16


@pytest.mark.parametrize("n", [1, 12])
def test_a_client_that_leaves_before_its_answer_frees_its_slots(
    client: httpx.Client, engine: HeldEngine, n: int
) -> None:
    body = {**ENDLESS, "model": "demo", "n": n}
    before = engine.stats().finished.get("cancelled", 0)
    engine.hold(after=2)
    engine.cancelled.clear()
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json=body, timeout=0.3)
    until(lambda: len(set(engine.cancelled)) == n)
    engine.go()
    until(lambda: idle(engine))
    assert engine.stats().finished["cancelled"] == before + n


def test_a_profile_dropped_in_is_served_within_two_seconds(
    client: httpx.Client, engine: TorchEngine, profiles: Path
) -> None:
    body = {"prompt": "Bread is", "max_tokens": 1, "profile": "fresh"}
    assert client.post("/generate", json=body).status_code == 404
    path = save_profile(random_profile(engine.info.identity, "fresh"), profiles)
    until(lambda: client.post("/generate", json=body).status_code == 200)
    path.unlink()
    until(lambda: client.post("/generate", json=body).status_code == 404)
    assert 3 * POLL_SECONDS < 2.0  # a file is read at the second look at it, the third interval after it came at most


def test_a_running_stream_keeps_its_version(client: httpx.Client, engine: HeldEngine, profiles: Path) -> None:
    identity = engine.info.identity
    save_profile(random_profile(identity, "moving", seed=1), profiles)
    body = {**ENDLESS, "max_tokens": 20, "profile": "moving", "temperature": 0}
    until(lambda: client.get("/profiles/moving").status_code == 200)
    version = client.get("/profiles/moving").json()["version"]
    undisturbed = client.post("/generate", json=body).json()
    engine.hold(after=5)
    with client.stream("POST", "/generate", json={**body, "stream": True}) as response:
        lines = response.iter_lines()
        first = [next(lines)]
        engine.until_held()
        save_profile(random_profile(identity, "moving", seed=2), profiles)
        until(lambda: client.get("/profiles/moving").json()["version"] != version)
        engine.go()
        rest = list(lines)
    assert client.post("/generate", json=body).json()["text"] != undisturbed["text"]
    assert f'"version":"{version}"' in rest[-2]
    pieces = re.findall(r'"delta":"((?:[^"\\]|\\.)*)"', "\n".join(first + rest))
    assert "".join(pieces) == undisturbed["text"].replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


@pytest.fixture
def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TRIMTAB_THREADS": "1"}


def test_the_command_serves_says_so_and_stops(tmp_path: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "server.cli", "serve", "--port", "0", "--profiles", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.fullmatch(r"trimtab serves demo with 0 profiles on (http://127\.0\.0\.1:\d+)\n", line)
        assert match is not None, line
        assert httpx.get(f"{match[1]}/ready").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_a_model_that_cannot_be_loaded_ends_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["trimtab", "serve", "--port", "0", "--model", str(tmp_path)])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    assert leaving.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} holds no config.json")


def test_a_stream_that_outlives_the_grace_ends_in_an_error(tmp_path: Path) -> None:
    body = {"model": "demo", **ENDLESS, "n": 20, "stream": True}
    with demo_engine(slots=1) as engine, ThreadPoolExecutor(1) as reader:
        with live_server(engine, tmp_path, grace=0.1) as client:
            answer = reader.submit(httpx.post, f"{client.base_url}/v1/completions", json=body, timeout=30)
            until(lambda: engine.stats().running == 1)
        *_, error, end, _ = answer.result().text.split("\n\n")
    message = "the generation was cancelled by the server: send the request again"
    assert json.loads(error.removeprefix("data: "))["error"]["message"] == message
    assert end == "data: [DONE]"


FAILING = """
import sys, threading
from server.engines.torch.engine import TorchEngine

plain, steps = TorchEngine.step, []

def step(self):
    steps.append(None)
    if len(steps) > 3:
        {fault}
    plain(self)

TorchEngine.step = step
from server import cli
cli.main()
"""


def reads(address: str, body: dict[str, Any], begun: threading.Semaphore | None = None) -> str:
    """The whole text of a stream, however it ends. `begun` is released at its first event."""
    received = []
    with suppress(httpx.HTTPError), httpx.stream("POST", f"{address}/generate", json=body, timeout=30) as answer:
        for text in answer.iter_text():
            received.append(text)
            if begun is not None and len(received) == 1:
                begun.release()
    return "".join(received)


@contextmanager
def command(environment: dict[str, str], directory: Path, *flags: str, code: str) -> Iterator[Any]:
    """A running `trimtab serve`, and its address."""
    words = ["serve", "--port", "0", "--profiles", str(directory), *flags]
    with ForkedCommand(words, environment, code=code, errors=directory / "log") as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().rpartition(" ")[2].strip()


def ends(text: str) -> int:
    """How many terminal events a stream has."""
    return text.count('"finish_reason"') + text.count('"error"')


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("threading.Event().wait()", "the engine has not finished a step in 1 s"),
        ("raise SystemExit", "the engine failed (SystemExit): it must be restarted"),
    ],
)
def test_an_engine_that_cannot_go_on_ends_the_process(
    tmp_path: Path, environment: dict[str, str], fault: str, problem: str
) -> None:
    code = FAILING.format(fault=fault)
    flags = ("--step-timeout-seconds", "1")
    with command(environment, tmp_path, *flags, code=code) as (process, address), ThreadPoolExecutor(1) as reader:
        text = reader.submit(reads, address, {**ENDLESS, "stream": True})
        health = httpx.get(f"{address}/health")
        while health.status_code == 200:
            health = httpx.get(f"{address}/health")
        ready = httpx.get(f"{address}/ready")
        assert (health.status_code, ready.status_code) == (503, 503)
        assert health.json()["error"]["message"] == ready.json()["error"]["message"] == problem
        assert process.wait(60) == 70
        assert ends(text.result()) == 1


class PanicException(BaseException):
    """As pyo3 names a panic of Rust."""


UNLOADABLE = """
import server.state

def fail(config):
    raise {error}

server.state.build_engine = fail
from server import cli
cli.main()
"""
DYING = [SystemExit("of a library"), KeyboardInterrupt("of a library"), PanicException("of Rust")]


@pytest.mark.parametrize("error", DYING, ids=lambda error: type(error).__name__)
def test_a_model_whose_loading_dies_makes_health_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(config: EngineConfig) -> Any:
        raise error

    monkeypatch.setattr("server.state.build_engine", fail)
    app = create_app(Settings(profiles=tmp_path))

    async def main() -> None:
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport) as client:
            with pytest.raises(RuntimeError, match=f"loading failed: {type(error).__name__}"):
                await app.state.service.wait_ready()
            for path in ("/health", "/ready", "/v1/models"):
                answer = await client.get(f"http://localhost{path}")
                assert answer.status_code == 503
                assert answer.json()["error"]["message"] == (
                    "the server could not load its model or profiles; its log says why"
                )

    asyncio.run(main())


@pytest.mark.parametrize("error", ["SystemExit", "KeyboardInterrupt", "type('PanicException', (BaseException,), {})()"])
def test_a_model_whose_loading_dies_ends_the_process(tmp_path: Path, environment: dict[str, str], error: str) -> None:
    with command(environment, tmp_path, code=UNLOADABLE.format(error=error)) as (process, address):
        assert process.wait(60) == 70
        assert address == ""  # it never said that it serves


@pytest.mark.parametrize("signals", [1, 2])
def test_sigterm_drains_and_ends_every_stream(tmp_path: Path, environment: dict[str, str], signals: int) -> None:
    """The first signal lets streams go on up to the limit, the second ends them."""
    flags = ("--slots", "16", "--drain-seconds", "5" if signals == 1 else "600")
    body = {"prompt": "Bread is", "max_tokens": 490, "ignore_eos": True, "stream": True}
    slow = FAILING.format(fault="import time; time.sleep(0.05)")
    with command(environment, tmp_path, *flags, code=slow) as (process, address), ThreadPoolExecutor(32) as readers:
        begun = threading.Semaphore(0)
        texts = [readers.submit(reads, address, body, begun) for _ in range(24)]
        texts += [readers.submit(reads, address, {**body, "max_tokens": 3}, begun) for _ in range(8)]
        assert all(begun.acquire(timeout=60) for _ in texts)
        process.send_signal(signal.SIGTERM)
        ready = httpx.get(f"{address}/ready")
        while ready.status_code == 200:
            ready = httpx.get(f"{address}/ready")
        assert ready.json()["error"]["code"] == "draining"
        assert httpx.get(f"{address}/health").status_code == 200
        assert httpx.post(f"{address}/generate", json=body).status_code == 503
        if signals == 2:
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert [ends(text.result()) for text in texts] == [1] * 32
