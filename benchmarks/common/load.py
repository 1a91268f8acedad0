"""Load on a local server, with the time of every event.

Streams are closed loops: each sends its next request when one has ended. Arrivals are a Poisson process. Count and time
are bounded, and a request that does not end in time is an error.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import TypeVar

from benchmarks.common.jobs import Job, Route, Target
from benchmarks.common.serving import Server
from benchmarks.common.streaming import Connection, Reply
from benchmarks.common.thread_times import ThreadTimes, thread_times

PATIENCE = 3  # maximum duration of a run, relative to the time in which it starts requests

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Done:
    """A request with its due time (by `perf_counter`) and its complete reply."""

    job: Job
    due: float
    reply: Reply


@dataclass(frozen=True, slots=True)
class Spent:
    """The wall time and the CPU times of a run, in seconds."""

    wall: float
    threads: ThreadTimes
    client: float


@dataclass(frozen=True, slots=True)
class Client:
    """Sends jobs to a server, and starts none after `seconds`."""

    server: Server
    target: Target
    route: Route
    seconds: float

    async def streams(self, jobs: Iterable[Job], count: int) -> list[Done]:
        """Run `count` closed loops until no job is left."""
        waiting, ended, end = iter(jobs), list[Done](), perf_counter() + self.seconds

        async def loop() -> None:
            async with Connection(self.server.port, self.server.key) as connection:
                while perf_counter() < end and (job := next(waiting, None)) is not None:
                    ended.append(await self._send(connection, job, perf_counter()))

        async with asyncio.timeout(PATIENCE * self.seconds), asyncio.TaskGroup() as tasks:
            for _ in range(count):
                tasks.create_task(loop())
        return ended

    async def arrivals(self, jobs: Sequence[Job], rate: float, *, seed: int = 0) -> list[Done]:
        """Start `rate` jobs per second on average, independently of earlier ones, beginning with a random gap."""
        draw, begin, due = random.Random(seed), perf_counter(), 0.0
        ended: list[Done] = []

        async def one(job: Job, due: float) -> None:
            async with Connection(self.server.port, self.server.key) as connection:
                ended.append(await self._send(connection, job, due))

        async with asyncio.timeout(PATIENCE * self.seconds), asyncio.TaskGroup() as tasks:
            for job in jobs:
                due += draw.expovariate(rate)
                if due > self.seconds:
                    break
                await asyncio.sleep(max(0.0, begin + due - perf_counter()))
                tasks.create_task(one(job, begin + due))
        return ended

    async def _send(self, connection: Connection, job: Job, due: float) -> Done:
        body = json.dumps(job.body(self.route, self.target.name)).encode()
        return Done(job, due, await connection.stream(job.path(self.route), body))

    def timed(self, work: Awaitable[T]) -> tuple[T, Spent]:
        """The result of the work, and the time it took."""
        return asyncio.run(self._timed(work))

    async def _timed(self, work: Awaitable[T]) -> tuple[T, Spent]:
        threads, wall, own = thread_times(self.server.pid), perf_counter(), process_time()
        result = await work
        wall, own = perf_counter() - wall, process_time() - own
        return result, Spent(wall, thread_times(self.server.pid) - threads, own)
