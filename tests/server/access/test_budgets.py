"""Budgets of keys: requests and tokens per minute, and requests at once."""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from server.access.budgets import MEMORY, Budgets, Exceeded
from server.access.keys import Key, add_key
from server.engines.torch.engine import TorchEngine
from server.http.listener import listen
from server.settings import ConfigurationError, Settings
from tests.server.http.test_error_responses import error_of
from tests.support.running import HeldEngine
from tests.support.serving import engine_fixture, live_server, profiles_fixture, until

pytestmark = pytest.mark.slow

engine = engine_fixture(slots=4, context=256, max_queue=4)
profiles = profiles_fixture("warm")
TEXT = {"prompt": "Bread is", "max_tokens": 4, "ignore_eos": True}


@pytest.fixture
def minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """One minute that does not end, however slow the machine is."""
    for module in ("limits.aio.storage.memory", "server.access.budgets"):
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(time=lambda: 1e9, monotonic=lambda: 0.0))


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def read_deltas(stream: httpx.Response, count: int) -> None:
    """Read this many pieces of text, each of at least one token."""
    pieces = (line for line in stream.iter_lines() if '"delta":"' in line and '"delta":""' not in line)
    for _ in range(count):
        next(pieces)


def check_refusal(response: httpx.Response, message: str, retry_after: str = "60") -> None:
    error = error_of(response, 429)
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert error["message"].startswith(message)
    assert response.headers["retry-after"] == retry_after


@pytest.mark.usefixtures("minute")
def test_requests_per_minute_of_each_key(engine: TorchEngine, profiles: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    few, _ = add_key(keys, "few", requests_per_minute=2)
    common, _ = add_key(keys, "common")
    with live_server(engine, profiles, api_key_file=keys, requests_per_minute=3) as client:
        for path in ("/generate", "/v1/completions"):
            assert client.post(path, json={"model": "demo", **TEXT}, headers=bearer(few)).status_code in (200, 400)
        for path in ("/generate", "/v1/completions"):
            refused = client.post(path, json=TEXT, headers=bearer(few))
            check_refusal(refused, "the key 'few' has used up its 2 requests per minute")
        assert [client.get("/v1/models", headers=bearer(common)).status_code for _ in range(4)] == [200, 200, 200, 429]
        assert client.get("/health", headers=bearer(few)).status_code == 200


@pytest.mark.usefixtures("minute")
def test_tokens_per_minute(engine: TorchEngine, profiles: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    secret, _ = add_key(keys, "team", tokens_per_minute=10)
    with live_server(engine, profiles, api_key_file=keys) as client:

        def generate() -> httpx.Response:
            return client.post("/generate", json=TEXT, headers=bearer(secret))

        assert [generate().status_code for _ in range(3)] == [200] * 3  # 12 tokens, the last ones beyond the budget
        check_refusal(generate(), "the key 'team' has used up its 10 tokens per minute")
        assert client.get("/v1/models", headers=bearer(secret)).status_code == 200  # generates nothing


@pytest.mark.parametrize("path", ["/v1/completions", "/compare"])
@pytest.mark.usefixtures("minute")
def test_all_tokens_of_a_request_are_charged(engine: TorchEngine, profiles: Path, path: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    secret, _ = add_key(keys, "team", tokens_per_minute=6 * 30)
    many = {"variants": ["warm@0.1", *[{"profiles": []}] * 5]} if path == "/compare" else {"model": "demo", "n": 6}
    exactly = {**TEXT, **many, "max_tokens": 29}
    with live_server(engine, profiles, api_key_file=keys) as client:
        assert client.post(path, json=exactly, headers=bearer(secret)).status_code == 200
        one = {**TEXT, "max_tokens": 3}
        assert client.post("/generate", json=one, headers=bearer(secret)).status_code == 200  # 177 of 180 so far
        assert client.post("/generate", json=one, headers=bearer(secret)).status_code == 200
        assert client.post("/generate", json=one, headers=bearer(secret)).status_code == 429


@pytest.mark.usefixtures("minute")
def test_a_stream_is_charged_while_it_runs_and_when_it_is_left(
    engine: HeldEngine, profiles: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    secret, _ = add_key(keys, "team", tokens_per_minute=64)
    with live_server(engine, profiles, api_key_file=keys) as client:
        endless = {**TEXT, "max_tokens": 200, "stream": True}
        engine.hold(after=100)
        with client.stream("POST", "/generate", json=endless, headers=bearer(secret)) as stream:
            read_deltas(stream, 64)
            assert client.post("/generate", json=TEXT, headers=bearer(secret)).status_code == 429
            stream.close()
            engine.go()
    left, _ = add_key(keys, "left", tokens_per_minute=5)
    with live_server(engine, profiles, api_key_file=keys) as client:
        with client.stream("POST", "/generate", json=endless, headers=bearer(left)) as stream:
            read_deltas(stream, 5)
        until(lambda: engine.stats().running == 0)
        assert client.post("/generate", json=TEXT, headers=bearer(left)).status_code == 429


def test_requests_at_once(engine: HeldEngine, profiles: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    secret, _ = add_key(keys, "team")
    other, _ = add_key(keys, "other", concurrent_requests=2)
    with live_server(engine, profiles, api_key_file=keys, concurrent_requests=1) as client:
        engine.hold(after=3)
        endless = {**TEXT, "max_tokens": 50, "stream": True}
        with client.stream("POST", "/generate", json=endless, headers=bearer(secret)) as stream:
            engine.until_held()
            refused = client.get("/v1/models", headers=bearer(secret))
            check_refusal(refused, "the key 'team' may run 1 requests at once: wait for one of them to end", "1")
            assert client.get("/v1/models", headers=bearer(other)).status_code == 200
            engine.go()
            stream.read()
        until(lambda: client.get("/v1/models", headers=bearer(secret)).status_code == 200)
        # a client that goes away leaves its place
        with client.stream("POST", "/generate", json=endless, headers=bearer(secret)) as stream:
            next(stream.iter_lines())
        until(lambda: client.get("/v1/models", headers=bearer(secret)).status_code == 200)


def test_requests_at_once_are_counted_without_a_gap() -> None:
    key = Key(name="a", sha256="0" * 64, concurrent_requests=2, requests_per_minute=100)
    budgets = Budgets(Settings())

    async def one() -> bool:
        async with budgets.admit(key, generates=True) as exceeded:
            for _ in range(5):
                await asyncio.sleep(0)
            return exceeded is None

    async def main() -> list[bool]:
        return await asyncio.gather(*(one() for _ in range(10)))

    assert sum(asyncio.run(main())) == 2
    assert not budgets._running


def test_a_storage_whose_library_is_missing_is_refused_by_its_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(ConfigurationError, match=r"--limits-storage cannot be used .*pip install 'trimtab\[redis\]'"):
        Budgets(Settings(limits_storage="redis://127.0.0.1:1"))


class Redis:
    """A Redis of this test's own."""

    def __init__(self, program: str, directory: Path) -> None:
        with listen("127.0.0.1", 0) as listener:
            self._port = listener.getsockname()[1]
        self._words = [program, "--port", str(self._port), "--bind", "127.0.0.1", "--save", "", "--dir", str(directory)]
        self.url = f"redis://127.0.0.1:{self._port}"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._words, stdout=subprocess.DEVNULL)
        until(lambda: is_open(self._port))

    def lose(self, how: str) -> None:
        if how == "hangs":
            self.process.send_signal(signal.SIGSTOP)
        else:
            self.process.kill()
            self.process.wait()

    def come_back(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
        else:
            self.start()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    """Skipped where there is none."""
    pytest.importorskip("redis")
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("no redis-server here")
    found = Redis(program, tmp_path)
    yield found
    found.stop()


def is_open(port: int) -> bool:
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) == 0


KEY = Key(name="a", sha256="0" * 64, requests_per_minute=3, tokens_per_minute=10)


async def admitted(budgets: Budgets) -> Exceeded | None:
    async with budgets.admit(KEY, generates=True) as exceeded:
        return exceeded


def test_servers_share_what_redis_counts(redis: Redis) -> None:
    async def main() -> list[Exceeded | None]:
        one, other, apart = (Budgets(Settings(limits_storage=url)) for url in (redis.url, redis.url, MEMORY))
        found = [await admitted(one), await admitted(other)]
        one.charge(KEY, 12)
        await asyncio.gather(*one._charging)
        found += [await admitted(other), await admitted(apart)]
        await asyncio.gather(*(each.close() for each in (one, other, apart)))
        return found

    first, second, third, alone = asyncio.run(main())
    assert (first, second, alone) == (None, None, None)
    assert third is not None
    assert third.message.startswith("the key 'a' has used up its 10 tokens per minute")
    assert 1 <= third.retry_after <= 60


def test_without_an_answer_of_redis_a_server_counts_alone(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("redis")

    async def main() -> list[Exceeded | None]:
        budgets = Budgets(Settings(limits_storage="redis://127.0.0.1:1"))
        found = [await admitted(budgets) for _ in range(4)]
        await budgets.close()
        return found

    *first, last = asyncio.run(main())
    assert first == [None] * 3
    assert last is not None
    assert last.message.startswith("the key 'a' has used up its 3 requests per minute")
    (record,) = (record for record in caplog.records if record.name == "server.access.budgets")
    assert "the storage of limits does not answer" in record.getMessage()


@pytest.mark.parametrize("lost", ["hangs", "ends"])
def test_redis_is_lost_and_comes_back(redis: Redis, lost: str) -> None:
    """Only the first request waits for it. What it counted before is counted on."""

    async def main() -> list[tuple[Exceeded | None, int]]:
        budgets, asked = Budgets(Settings(limits_storage=redis.url)), 0
        shared = budgets._shared
        assert shared is not None
        hit = shared.hit

        async def counted(*given: Any, **options: Any) -> bool:
            nonlocal asked
            asked += 1
            return await hit(*given, **options)

        shared.hit = counted  # type: ignore[method-assign]

        async def after() -> tuple[Exceeded | None, int]:
            return await admitted(budgets), asked

        found = [await after(), await after()]
        redis.lose(lost)
        found += [await after() for _ in range(3)]
        redis.come_back()
        found.append(await after())
        budgets._ask_again = 0.0  # as after RETRY_SECONDS
        found += [await after(), await after()]
        await budgets.close()
        return found

    found = asyncio.run(main())
    # with Redis, 2 of its 3; without it, all 3 of this process; then the fourth; and Redis again
    assert [asked for _, asked in found[:2]] == [1, 2]
    assert len({asked for _, asked in found[2:6]}) == 1
    assert [exceeded is None for exceeded, _ in found[:6]] == [True] * 5 + [False]
    left = 1 if lost == "hangs" else 2  # one that ended has forgotten what it counted
    assert [exceeded is None for exceeded, _ in found[6:]] == [True, left > 1]
    assert found[-1][1] == found[5][1] + 2


@pytest.mark.parametrize("step", [-3600.0, 3600.0])
def test_a_minute_ends_although_the_clock_was_set(monkeypatch: pytest.MonkeyPatch, step: float) -> None:
    now = SimpleNamespace(wall=1e9, steady=50.0)
    for module in ("limits.aio.storage.memory", "server.access.budgets"):
        clock = SimpleNamespace(time=lambda: now.wall, monotonic=lambda: now.steady)
        monkeypatch.setattr(f"{module}.time", clock)

    async def main() -> None:
        budgets = Budgets(Settings())
        assert [await admitted(budgets) for _ in range(3)] == [None] * 3
        assert await admitted(budgets) is not None
        now.wall += step
        assert [await admitted(budgets) for _ in range(3)] == [None] * 3  # a minute begins
        refused = await admitted(budgets)
        assert refused is not None
        assert refused.retry_after <= 60
        now.wall, now.steady = now.wall + 61, now.steady + 61
        assert await admitted(budgets) is None

    asyncio.run(main())
