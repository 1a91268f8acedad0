"""A small server of feedback without an engine, for tests that kill it: numbers of votes come by a pipe, and go back
with the ids of what was stored."""

from __future__ import annotations

import asyncio
from multiprocessing.connection import Connection

from server.feedback.items import Item, Subject, Who
from server.feedback.store import FeedbackStore


def vote(number: int) -> Item:
    """One of many different votes, each with a key of its own."""
    texts = (Subject("a", text=f"good {number}"), Subject("b", text=f"bad {number}"))
    return Item("pair", {"better": "a"}, texts, f"prompt {number}", None, f"vote-{number}")


def serve_votes(url: str, pipe: Connection) -> None:
    """Store votes until the pipe is closed."""
    asyncio.run(_serve(url, pipe))


async def _serve(url: str, pipe: Connection) -> None:
    store = FeedbackStore.open(url, keep_generations=None, keep_feedback=None)
    numbers: asyncio.Queue[int | None] = asyncio.Queue()

    def read() -> None:
        try:
            numbers.put_nowait(pipe.recv())
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(pipe.fileno())
            numbers.put_nowait(None)

    async def answer(number: int) -> None:
        (added,) = await store.add([vote(number)], Who())
        pipe.send((number, added.id))

    asyncio.get_running_loop().add_reader(pipe.fileno(), read)
    tasks = []
    while (number := await numbers.get()) is not None:
        tasks.append(asyncio.create_task(answer(number)))
    await asyncio.gather(*tasks)
    await store.close()
