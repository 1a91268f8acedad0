"""What storing feedback costs: processor time for each vote, and speed of streams beside 10,000 votes a minute.

    python -m benchmarks.speed.feedback [--model demo] [--streams 16] [--votes 10000] [--seconds 60] [--batch 1]

Votes are sent at a steady rate, each with an idempotency key. First they are sent alone: the processor time of the
server's threads is compared with that of a server at rest. Then streams run all the time, and rounds without votes and
with votes take turns; the server keeps every generation in all of them. Printed are the times for each vote, the tokens
per second of each round, the loss, the votes that were stored, and how long they took. It fails if a vote is not
answered by a 201, or if the database does not hold each of them once.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from benchmarks.common.serving import Server, serving
from benchmarks.common.streaming import Connection
from benchmarks.common.thread_times import ThreadTimes, thread_times

TOKENS = 128
STREAM = {"prompt": "Bread is", "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
PER_MINUTE = 60.0
FIRST_SECONDS = 2.0
CONNECTIONS = 32  # that votes are sent on


@dataclass(frozen=True, slots=True)
class Round:
    """Tokens per second of all streams, the seconds that each vote took, and the processor time of the server."""

    tokens_per_second: float
    vote_seconds: tuple[float, ...]
    threads: ThreadTimes


@dataclass(frozen=True, slots=True)
class Plan:
    """How a round is run."""

    server: Server
    streams: int
    per_second: float
    seconds: float
    batch: int


def main(
    model: Annotated[str, typer.Option(help="The model.")] = "demo",
    streams: Annotated[int, typer.Option(help="Streams at once; 0 measures the time for each vote only.")] = 16,
    votes: Annotated[int, typer.Option(help="Votes per minute.")] = 10_000,
    seconds: Annotated[float, typer.Option(help="Length of a round.")] = 60.0,
    rounds: Annotated[int, typer.Option(help="Rounds of each kind.")] = 3,
    batch: Annotated[int, typer.Option(help="Votes per request.")] = 1,
    database: Annotated[str, typer.Option(help="A postgresql:// URL; by default a new SQLite file.")] = "",
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        profiles = Path(directory) / "profiles"
        profiles.mkdir()
        url = database or str(Path(directory) / "feedback.db")
        settings: dict[str, Any] = {"slots": max(streams, 1), "feedback_database": url, "keep_generations": "forever"}
        with serving(model, profiles, **settings) as server:
            plan = Plan(server, streams, votes / PER_MINUTE, seconds, batch)
            first, at_rest, alone = asyncio.run(cost(plan))
            plain, voted = asyncio.run(measure(plan, rounds if streams else 0))
            stored = count(server.url)
    sent = [duration for one in (first, alone, *voted) for duration in one.vote_seconds]
    if stored != len(sent):
        raise SystemExit(f"{len(sent)} votes were sent, and {stored} are stored")
    print(f"each vote      {described(alone.threads - at_rest.threads, len(alone.vote_seconds))}")
    if streams:
        without = statistics.median(one.tokens_per_second for one in plain)
        beside = statistics.median(one.tokens_per_second for one in voted)
        print(f"without votes  {without:8.1f} tokens/s   rounds {shown(plain)}")
        print(f"beside votes   {beside:8.1f} tokens/s   rounds {shown(voted)}")
        print(f"loss           {100 * (1 - beside / without):8.2f} %")
    rate = PER_MINUTE * len(sent) / (FIRST_SECONDS + seconds * (1 + len(voted)))
    slow = sorted(sent)[int(0.99 * len(sent))]
    times = f"median {1000 * statistics.median(sent):.1f} ms, p99 {1000 * slow:.1f} ms"
    print(f"votes stored   {stored}, {rate:.0f} a minute; {times}")


def described(spent: ThreadTimes, votes: int) -> str:
    """Microseconds of a vote."""
    loop, writer = (1e6 * spent_on / votes for spent_on in (spent.loop, spent.others))
    return f"{loop + writer:8.0f} us of processor time: {loop:.0f} event loop, {writer:.0f} other threads"


def shown(rounds: Sequence[Round]) -> str:
    return ", ".join(f"{one.tokens_per_second:.1f}" for one in rounds)


async def cost(plan: Plan) -> tuple[Round, Round, Round]:
    """A few votes, which come to a cold server, a round at rest, and one of votes alone."""
    alone = replace(plan, streams=0)
    first = await one_round(replace(alone, seconds=FIRST_SECONDS), "first")
    return first, await one_round(replace(alone, per_second=0.0), ""), await one_round(alone, "alone")


async def measure(plan: Plan, rounds: int) -> tuple[list[Round], list[Round]]:
    """Rounds without votes and with votes, in turns."""
    plain, voted = [], []
    for number in range(rounds):
        plain.append(await one_round(replace(plan, per_second=0.0), ""))
        voted.append(await one_round(plan, f"{number}"))
    return plain, voted


async def one_round(plan: Plan, name: str) -> Round:
    ending = asyncio.Event()
    running = [asyncio.create_task(stream(plan.server.port, ending)) for _ in range(plan.streams)]
    await asyncio.sleep(0.5)  # all have begun
    before, began = thread_times(plan.server.pid), time.perf_counter()
    sent = await vote_for(plan, name, began)
    ended, after = time.perf_counter(), thread_times(plan.server.pid)
    ending.set()
    tokens = sum(began <= came <= ended for times in await asyncio.gather(*running) for came in times)
    return Round(tokens / (ended - began), tuple(sent), after - before)


async def stream(port: int, ending: asyncio.Event) -> list[float]:
    """Generate one text after the other. Returns the times of all events, of which each has a token."""
    body = json.dumps(STREAM).encode()
    times: list[float] = []
    async with Connection(port) as connection:
        while not ending.is_set():
            reply = await connection.stream("/generate", body)
            times += [came for came, frame in reply.frames if b'"delta"' in frame]
    return times


async def vote_for(plan: Plan, name: str, began: float) -> list[float]:
    """Send votes at a steady rate until the round is over. Returns the seconds that each took."""
    took: list[float] = []
    free: asyncio.Queue[Connection] = asyncio.Queue()
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as sending:
        for _ in range(CONNECTIONS if plan.per_second else 0):
            free.put_nowait(await stack.enter_async_context(Connection(plan.server.port)))
        number = 0
        while (passed := time.perf_counter() - began) < plan.seconds:
            while number < passed * plan.per_second:
                names = [f"{name}-{number + place}" for place in range(plan.batch)]
                sending.create_task(vote(await free.get(), free, names, took))
                number += plan.batch
            await asyncio.sleep(0.002)
    return took


async def vote(
    connection: Connection, free: asyncio.Queue[Connection], names: Sequence[str], took: list[float]
) -> None:
    """Send votes in one request, and note how long each took."""
    body = [
        {
            "kind": "pair",
            "prompt": "Bread is",
            "a": {"text": f"good {name}"},
            "b": {"text": f"bad {name}"},
            "better": "a",
            "idempotency_key": name,
        }
        for name in names
    ]
    began = time.perf_counter()
    status, answer = await connection.post("/feedback", json.dumps(body).encode())
    if status != 201:
        raise RuntimeError(f"{status}: {answer.decode()}")
    took += [time.perf_counter() - began] * len(names)
    free.put_nowait(connection)


def count(url: str) -> int:
    """The number of votes that the server lists."""
    found, after = 0, "0"
    while after is not None:
        page = json.loads(httpx.get(f"{url}/feedback", params={"limit": 1000, "after": after}, timeout=60).text)
        found += len(page["feedback"])
        after = page["next"]
    return found


if __name__ == "__main__":
    typer.run(main)
