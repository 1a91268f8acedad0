"""What storing feedback costs streams: their tokens per second without votes, and beside 10,000 votes a minute.

    python -m benchmarks.speed.feedback [--model demo] [--streams 16] [--votes 10000] [--seconds 60] [--batch 1]

Streams run all the time; each that ends begins again. Rounds without votes and with votes take turns, and the server
keeps every generation in all of them. Votes are sent at a steady rate, each with an idempotency key. Printed are the
tokens per second of each round, the loss, the votes that were stored, and how long they took. It fails if a vote is not
answered by a 201, or if the database does not hold each of them once.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from benchmarks.common.serving import serving

TOKENS = 128
PER_MINUTE = 60.0


@dataclass(frozen=True, slots=True)
class Round:
    """Tokens per second of all streams, and the seconds that each vote took."""

    tokens_per_second: float
    vote_seconds: tuple[float, ...]


def main(
    model: Annotated[str, typer.Option(help="The model.")] = "demo",
    streams: Annotated[int, typer.Option(help="Streams at once.")] = 16,
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
        settings: dict[str, Any] = {"slots": streams, "feedback_database": url, "keep_generations": "forever"}
        with serving(model, profiles, **settings) as server:
            plain, voted = asyncio.run(measure(server.url, streams, votes / PER_MINUTE, seconds, rounds, batch))
            stored = count(server.url)
    sent = [duration for one in voted for duration in one.vote_seconds]
    if stored != len(sent):
        raise SystemExit(f"{len(sent)} votes were sent, and {stored} are stored")
    without = statistics.median(one.tokens_per_second for one in plain)
    beside = statistics.median(one.tokens_per_second for one in voted)
    print(f"without votes  {without:8.1f} tokens/s   rounds {shown(plain)}")
    print(f"beside votes   {beside:8.1f} tokens/s   rounds {shown(voted)}")
    print(f"loss           {100 * (1 - beside / without):8.2f} %")
    rate = PER_MINUTE * len(sent) / (seconds * rounds)
    slow = sorted(sent)[int(0.99 * len(sent))]
    times = f"median {1000 * statistics.median(sent):.1f} ms, p99 {1000 * slow:.1f} ms"
    print(f"votes stored   {stored}, {rate:.0f} a minute; {times}")


def shown(rounds: Sequence[Round]) -> str:
    return ", ".join(f"{one.tokens_per_second:.1f}" for one in rounds)


async def measure(
    url: str, streams: int, votes_per_second: float, seconds: float, rounds: int, batch: int
) -> tuple[list[Round], list[Round]]:
    """Rounds without votes and with votes, in turns."""
    plain, voted = [], []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        for number in range(rounds):
            plain.append(await one_round(client, streams, 0, seconds, f"{number}", batch))
            voted.append(await one_round(client, streams, votes_per_second, seconds, f"{number}", batch))
    return plain, voted


async def one_round(
    client: httpx.AsyncClient, streams: int, votes_per_second: float, seconds: float, name: str, batch: int
) -> Round:
    tokens = [0]
    running = [asyncio.create_task(stream(client, tokens)) for _ in range(streams)]
    while tokens[0] < streams:  # all have begun
        await asyncio.sleep(0.01)
    before, began = tokens[0], time.perf_counter()
    sent: list[float] = []
    sending: list[asyncio.Task[None]] = []
    while (passed := time.perf_counter() - began) < seconds:
        while batch * len(sending) < passed * votes_per_second:
            names = [f"{name}-{len(sending)}-{place}" for place in range(batch)]
            sending.append(asyncio.create_task(vote(client, names, sent)))
        await asyncio.sleep(0.005)
    rate = (tokens[0] - before) / (time.perf_counter() - began)
    await asyncio.gather(*sending)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    return Round(rate, tuple(sent))


async def stream(client: httpx.AsyncClient, tokens: list[int]) -> None:
    """Generate one text after the other, counting events, of which each has a token."""
    body = {"prompt": "Bread is", "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
    while True:
        async with client.stream("POST", "/generate", json=body) as response:
            async for line in response.aiter_lines():
                tokens[0] += line.startswith("data:")


async def vote(client: httpx.AsyncClient, names: Sequence[str], sent: list[float]) -> None:
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
    response = await client.post("/feedback", json=body)
    if response.status_code != 201:
        raise RuntimeError(f"{response.status_code}: {response.text}")
    sent += [time.perf_counter() - began] * len(names)


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
