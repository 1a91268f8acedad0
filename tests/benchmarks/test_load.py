"""The load of benchmarks/speed/http.py: every request is answered as it was asked for, and the figures add up."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from benchmarks.common.jobs import Job, Target, lengths_of, make_jobs
from benchmarks.common.latencies import busy_seconds, check, figures
from benchmarks.common.load import Client
from benchmarks.common.serving import Server
from server.engines.torch.engine import TorchEngine
from tests.support.serving import client_fixture, engine_fixture, profiles_fixture

engine = engine_fixture(slots=4)
profiles = profiles_fixture("p0", "p1", unit=0.05)
client = client_fixture()


@pytest.fixture
def target(engine: TorchEngine, profiles: Path) -> Target:
    return Target("demo", "demo", engine.info.vocab_size, profiles, ("p0", "p1"))


def jobs_for(target: Target) -> list[Job]:
    return make_jobs(target, 6, prompts=(4, 20), completions=(2, 8), seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("route", ["completions", "generate"])
@pytest.mark.parametrize("rate", [None, 50.0])
def test_load(client: httpx.Client, target: Target, route: str, rate: float | None) -> None:
    load = Client(Server(str(client.base_url).rstrip("/"), os.getpid()), target, route, seconds=30)
    jobs = jobs_for(target)
    done, spent = load.timed(load.streams(jobs, 3) if rate is None else load.arrivals(jobs, rate))
    found = figures(done, spent)
    assert sorted(one.job.seed for one in done) == sorted(job.seed for job in jobs)
    assert found["output_tokens"] == sum(job.tokens for job in jobs)
    assert found["first_token_ms"]["p50"] > 0
    assert 0 < busy_seconds(done) <= spent.wall
    assert busy_seconds(done[:1]) == done[0].reply.ended - done[0].due
    assert found["processors"]["engine"]["of_wall"] > 0
    done[0] = replace(done[0], job=replace(done[0].job, tokens=99))
    with pytest.raises(RuntimeError, match="and 99 tokens were requested"):
        check(done)


def test_a_refused_request_is_an_error(client: httpx.Client, target: Target) -> None:
    load = Client(Server(str(client.base_url).rstrip("/"), os.getpid()), target, "generate", seconds=30)
    bad = replace(jobs_for(target)[0], steering=(("nobody", 1.0),))
    with pytest.raises(ExceptionGroup) as raised:
        load.timed(load.streams([bad], 1))
    assert raised.group_contains(RuntimeError, match="404")


def test_jobs(target: Target) -> None:
    jobs = jobs_for(target)
    assert jobs == jobs_for(target)
    assert all(4 <= len(job.prompt) <= 20 and 2 <= job.tokens <= 8 for job in jobs)
    assert lengths_of("16:128") == (16, 128)
    assert lengths_of("64") == (64, 64)
    with pytest.raises(ValueError, match="is not a range of lengths"):
        lengths_of("8:4")
