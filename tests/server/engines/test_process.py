"""What an engine in a process of its own adds to the contract: the child may die."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.app import create_app
from server.engines.config import EngineConfig
from server.engines.errors import Unavailable
from server.engines.process import ProcessEngine
from server.engines.protocol import Delta, Finished, SteeringPlan
from server.settings import Settings
from steering_vectors.errors import ModelError
from steering_vectors.profiles.files import save_profile
from tests.support.contract import Served, make_engine, tiny_language_model
from tests.support.running import outcome, plan, random_profile, request, submit

pytestmark = pytest.mark.slow

PROMPT = (20, 31, 42, 53, 64, 75)
ENDLESS: dict[str, Any] = {"ignore_eos": True, "max_tokens": None}
make = partial(make_engine, EngineConfig(slots=2, context=250))


def fail() -> Any:
    raise ModelError("there is no such model")


@contextmanager
def started() -> Iterator[Served]:
    with asyncio.Runner() as runner:
        engine = runner.run(ProcessEngine.start(make))
        try:
            yield Served(engine, runner.run)
        finally:
            runner.run(engine.close())


@pytest.fixture(scope="module")
def one() -> Iterator[Served]:
    """An engine for tests that do not count what it did before."""
    with started() as found:
        yield found


async def restarted(engine: ProcessEngine, count: int) -> None:
    while engine.stats().restarts < count or not engine._ready:
        await asyncio.sleep(0.02)


def test_what_cannot_be_made_is_raised() -> None:
    async def main() -> None:
        with pytest.raises(ModelError, match="there is no such model"):
            await ProcessEngine.start(fail)

    asyncio.run(main())


def test_a_child_that_dies_ends_its_requests_and_is_started_again() -> None:
    warm = random_profile(tiny_language_model(), "warm", seed=1, scale=2.0)
    steered = plan(warm)

    async def main() -> None:
        engine = await ProcessEngine.start(make)
        try:
            asked = request(PROMPT, steered, max_tokens=8, ignore_eos=True)
            before = await outcome(engine, asked)
            streams = [await submit(engine, request(PROMPT, steered, **ENDLESS)) for _ in range(3)]
            assert isinstance(await anext(streams[0]), Delta)
            calls = [asyncio.create_task(engine.explain(steered)) for _ in range(2)]
            first = engine._process.pid
            os.kill(first, signal.SIGKILL)
            for stream in streams:
                events = [event async for event in stream]
                assert isinstance(events[-1], Finished)
                assert (events[-1].reason, events[-1].prompt_tokens) == ("error", len(PROMPT))
                assert events[-1].error is not None
            for outcome_ in await asyncio.gather(*calls, return_exceptions=True):
                assert not isinstance(outcome_, Exception) or isinstance(outcome_, Unavailable)
            with pytest.raises(Unavailable) as failure:
                await engine.submit([asked])
            assert failure.value.code == "restarting"
            await restarted(engine, 1)
            assert engine._process.pid != first
            after = await outcome(engine, asked)  # steered by the same profile, which nobody loaded again
            assert after.ids == before.ids
            stats = engine.stats()
            assert (stats.restarts, stats.finished["length"], stats.profiles) == (1, 2, 1)
        finally:
            await engine.close()
        with pytest.raises(Unavailable, match="shut down"):
            await engine.submit([asked])

    asyncio.run(main())


@pytest.mark.parametrize("hung", ["step", "process"])
def test_a_child_that_hangs_is_killed_and_started_again(hung: str) -> None:
    limit = 1.0

    async def main() -> None:
        make_hanging = partial(make_engine, EngineConfig(slots=2, context=250, step_timeout_seconds=limit))
        engine = await ProcessEngine.start(Hanging(make_hanging) if hung == "step" else make_hanging, limit)
        try:
            stream = await submit(engine, request(PROMPT, **ENDLESS))
            first = engine._process.pid
            if hung == "process":
                os.kill(first, signal.SIGSTOP)
            events = [event async for event in stream]
            assert isinstance(events[-1], Finished)
            assert events[-1].reason == "error"
            await restarted(engine, 1)
            assert engine._process.pid != first
        finally:
            await engine.close()

    asyncio.run(main())


class Hanging:
    """Makes an engine whose third step never ends."""

    def __init__(self, make: Any) -> None:
        self._make = make

    def __call__(self) -> Any:
        engine = self._make()
        step, left = engine.step, [None] * 3

        def hang() -> None:
            left.pop()
            if not left:
                threading.Event().wait()
            step()

        engine.step = hang
        return engine


def test_counts_of_profiles_outlive_a_child(one: Served) -> None:
    warm, engine = random_profile(tiny_language_model(), "warm", seed=1), one.engine

    async def main() -> None:
        before, restarts = engine.stats().profiles, engine.stats().restarts
        for _ in range(2):
            await engine.load_profile(warm)
        os.kill(engine._process.pid, signal.SIGKILL)
        await restarted(engine, restarts + 1)
        await engine.unload_profile(warm.version)
        assert (await engine.explain(plan(warm))).terms
        await engine.unload_profile(warm.version)
        await engine.explain(SteeringPlan())
        assert engine.stats().profiles == before

    one.run(main())


def test_the_server_answers_while_the_child_is_started_again(one: Served, tmp_path: Path) -> None:
    lm, engine = tiny_language_model(), one.engine
    save_profile(random_profile(lm, "warm", scale=2.0), tmp_path)

    async def main() -> None:
        restarts = engine.stats().restarts
        app = create_app(Settings(profiles=tmp_path), engine)
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
        ):
            await app.state.service.wait_ready()
            body = {"prompt": list(PROMPT), "max_tokens": 4, "profile": "warm", "temperature": 0}
            before = (await client.post("/generate", json=body)).json()
            os.kill(engine._process.pid, signal.SIGKILL)
            while engine._ready:
                await asyncio.sleep(0.01)
            assert (await client.get("/health")).status_code == 200
            refused = await client.post("/generate", json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "restarting")
            await restarted(engine, restarts + 1)
            after = (await client.post("/generate", json=body)).json()
            assert (after["text"], after["steering"]) == (before["text"], before["steering"])

    one.run(main())


def test_a_submit_that_nobody_waits_for_is_seen_to_end(one: Served) -> None:
    """Its caller is cancelled when the child has accepted it, and the parent does not know that yet."""
    engine = one.engine

    async def main() -> None:
        before = Counter(engine.stats().finished)
        asked = request(PROMPT, **ENDLESS)
        submitting = asyncio.create_task(engine.submit([asked]))
        await asyncio.sleep(0.001)
        submitting.cancel()
        while engine._live or not Counter(engine.stats().finished) - before:
            await asyncio.sleep(0.001)
        assert submitting.cancelled()
        assert set(Counter(engine.stats().finished) - before) <= {"cancelled", "length"}
        assert (await outcome(engine, request(PROMPT, max_tokens=2))).end.reason in ("length", "stop")

    one.run(main())


def test_a_child_ends_with_its_parent() -> None:
    with started() as one:
        pid = one.engine._process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
