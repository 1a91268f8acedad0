"""Whether votes survive `kill -9`: none that was answered is lost, and none counts twice when it is sent again.

    python -m benchmarks.reliability.feedback_crashes [--kills 20] [--database postgresql://…] [--seed 0]

`trimtab serve` runs on the demo model; each of its processes is forked from one that has imported everything. Clients
send votes, each with an idempotency key: pairs of texts, thumbs on generations, and lists. At a random moment the
server is killed. The next one gets again what was not answered, and some of what was. At the end each vote must be
listed once, under the id that was answered. It fails if one is not.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import tempfile
from collections import Counter, deque
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from benchmarks.common.forked import forked_server
from benchmarks.common.serving import Server

CLIENTS = 16
REPEATED = 0.2  # of the votes that were answered before
LONGEST_SECONDS = 0.15  # from the last answer that is waited for to the kill
PAGE = 1000


@dataclass(frozen=True, slots=True)
class Vote:
    """A request of one or several pieces of feedback. `keys` are their idempotency keys, and their users, by which they
    are found again."""

    keys: tuple[str, ...]
    body: Any
    generation: str | None = None  # that it names


@dataclass(slots=True)
class Seen:
    """What the clients know. `answered` has the id of each piece of feedback, by its idempotency key."""

    answered: dict[str, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


class Clients:
    """Sends votes to one server after the other, and remembers what was answered."""

    def __init__(self, seed: int) -> None:
        self.seen = Seen()
        self._draw = random.Random(seed)
        self._made = 0
        self._lost: deque[Vote] = deque()  # of which no answer came
        self._done: list[Vote] = []
        self._generations: list[str] = []  # of which the server has stored a vote, and so kept them

    async def vote_and_kill(self, server: Server, after: int) -> None:
        """Send votes, and kill the server a moment after so many answers."""
        reached = asyncio.Event()
        target = self.seen.counts["answers"] + after
        async with _client(server) as client:
            workers = [asyncio.create_task(self._vote_on(client, reached, target)) for _ in range(CLIENTS)]
            await reached.wait()
            await asyncio.sleep(self._draw.uniform(0, LONGEST_SECONDS))
            os.kill(server.pid, signal.SIGKILL)
            await asyncio.gather(*workers)

    async def finish(self, server: Server) -> None:
        """Send again what was not answered, and compare what is listed with what was answered."""
        async with _client(server) as client:
            while self._lost:
                vote = self._lost.popleft()
                if not await self._send(client, vote):
                    raise RuntimeError("the server is gone")
            listed = await _listed(client)
        keys = Counter(key for key, _ in listed)
        self.seen.counts["lost"] = sum(key not in keys for key in self.seen.answered)
        self.seen.counts["twice"] = sum(count - 1 for count in keys.values())
        of_other_ids = sum(self.seen.answered.get(key) != name for key, name in listed)
        if of_other_ids:
            self.seen.problems.append(f"{of_other_ids} votes are listed under another id than was answered")

    async def _vote_on(self, client: httpx.AsyncClient, reached: asyncio.Event, target: int) -> None:
        """Send one vote after the other until the server is gone."""
        while await self._send(client, await self._next(client)):
            if self.seen.counts["answers"] >= target:
                reached.set()
        reached.set()  # also if it has ended by itself, which `finish` will find

    async def _next(self, client: httpx.AsyncClient) -> Vote:
        if self._lost:
            self.seen.counts["sent again"] += 1
            return self._lost.popleft()
        if self._done and self._draw.random() < REPEATED:
            self.seen.counts["repeated"] += 1
            return self._draw.choice(self._done)
        self._made += 1
        number, kind = self._made, self._draw.random()
        if kind < 0.1 and (made := await self._generation(client)) is not None:
            return _thumb(number, made)
        return _several(number) if kind < 0.3 else _pair(number)

    async def _generation(self, client: httpx.AsyncClient) -> str | None:
        """The id of a generation that was kept, or of a new one, which may not be kept if the server is killed."""
        if self._generations and self._draw.random() < 0.5:
            return self._draw.choice(self._generations)
        body = {"prompt": "Bread is", "max_tokens": 2, "ignore_eos": True}
        with suppress(httpx.TransportError):
            name: str = (await client.post("/generate", json=body)).json()["id"]
            return name
        return None

    async def _send(self, client: httpx.AsyncClient, vote: Vote) -> bool:
        """Send a vote and note its answer. False, and the vote is to be sent again, if the server is gone."""
        try:
            response = await client.post("/feedback", json=vote.body)
        except httpx.TransportError:
            self.seen.counts["cut off"] += 1
            self._lost.append(vote)
            return False
        self.seen.counts["answers"] += 1
        if response.status_code == 404 and vote.generation is not None and vote.generation not in self._generations:
            self.seen.counts["generations lost"] += 1  # it ended just before the kill: it is kept soon, not at once
            return True
        if response.status_code != 201:
            self.seen.problems.append(f"a vote was answered by {response.status_code}: {response.text}")
            return True
        if response.headers.get("idempotent-replayed"):
            self.seen.counts["replayed"] += 1
        self._done.append(vote)
        if vote.generation is not None:
            self._generations.append(vote.generation)
        for key, one in zip(vote.keys, response.json()["feedback"], strict=True):
            if self.seen.answered.setdefault(key, one["id"]) != one["id"]:
                self.seen.problems.append(f"the vote {key} was answered with two ids")
        return True


def run(start: Callable[[], AbstractContextManager[Server]], kills: int, seed: int, most_answers: int = 60) -> Seen:
    """Kill so many servers of one database, each after 1 to `most_answers` answers, and let a last one finish. Raises
    SystemExit if a promise is broken."""
    clients = Clients(seed)
    draw = random.Random(seed)
    for _ in range(kills):
        with start() as server:
            asyncio.run(clients.vote_and_kill(server, draw.randint(1, most_answers)))
    with start() as server:
        asyncio.run(clients.finish(server))
    seen = clients.seen
    if seen.problems or seen.counts["lost"] or seen.counts["twice"]:
        raise SystemExit(f"{dict(seen.counts)} {seen.problems[:5]}")
    return seen


def main(
    kills: Annotated[int, typer.Option(help="How often the server is killed.")] = 20,
    database: Annotated[str, typer.Option(help="An empty postgresql:// URL; by default a new SQLite file.")] = "",
    seed: Annotated[int, typer.Option(help="Of the moments and the votes.")] = 0,
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        url = database or str(Path(directory) / "feedback.db")
        profiles = Path(directory) / "profiles"
        profiles.mkdir()
        settings: dict[str, Any] = {"slots": 4, "feedback_database": url, "keep_generations": "forever"}
        seen = run(lambda: forked_server(profiles, Path(directory) / "log", **settings), kills, seed)
    counts = seen.counts
    print(f"{kills} kills; {counts['answers']} answers, {counts['cut off']} requests cut off")
    again = f"{counts['sent again']} requests were sent again after a kill, {counts['repeated']} after an answer"
    print(f"{again}; {counts['replayed']} answers were replays")
    print(f"{len(seen.answered)} votes are stored; {counts['lost']} lost, {counts['twice']} counted twice")


def _client(server: Server) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=server.url, timeout=60, limits=httpx.Limits(max_keepalive_connections=CLIENTS))


def _pair(number: int) -> Vote:
    texts = {"prompt": "Bread is", "a": {"text": f"good {number}"}, "b": {"text": f"hard {number}"}}
    return _vote(f"pair-{number}", {"kind": "pair", **texts, "better": "a"})


def _thumb(number: int, generation: str) -> Vote:
    return _vote(f"thumb-{number}", {"kind": "thumb", "answer": {"generation": generation}, "thumb": "up"}, generation)


def _several(number: int) -> Vote:
    answer = {"text": f"good {number}"}
    votes = [
        _pair(number),
        _vote(f"rating-{number}", {"kind": "rating", "prompt": "Bread is", "answer": answer, "rating": 4}),
        _vote(f"signal-{number}", {"kind": "signal", "prompt": "Bread is", "answer": answer, "signal": "copied"}),
    ]
    return Vote(tuple(key for vote in votes for key in vote.keys), [vote.body for vote in votes])


def _vote(key: str, body: dict[str, Any], generation: str | None = None) -> Vote:
    return Vote((key,), {**body, "user": key, "idempotency_key": key}, generation)


async def _listed(client: httpx.AsyncClient) -> list[tuple[str, str]]:
    """The user, which is the idempotency key, and the id of all feedback."""
    found: list[tuple[str, str]] = []
    after: str | None = "0"
    while after is not None:
        page = (await client.get("/feedback", params={"limit": PAGE, "after": after})).json()
        found += [(one["user"], one["id"]) for one in page["feedback"]]
        after = page["next"]
    return found


if __name__ == "__main__":
    typer.run(main)
