"""A small server of feedback without an engine, for tests that kill it: votes are lines on stdin, answers on stdout.

python -m tests.support.feedback_server DATABASE
"""

from __future__ import annotations

import asyncio
import json
import sys

from server.feedback.items import Item, Subject, Who
from server.feedback.store import FeedbackStore


def vote(number: int) -> Item:
    """One of many different votes, each with a key of its own."""
    texts = (Subject("a", text=f"good {number}"), Subject("b", text=f"bad {number}"))
    return Item("pair", {"better": "a"}, texts, f"prompt {number}", None, f"vote-{number}")


async def main(url: str) -> None:
    store = FeedbackStore.open(url, keep_generations=None, keep_feedback=None)
    loop = asyncio.get_running_loop()
    lines: asyncio.StreamReader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    print("ready", flush=True)

    async def answer(number: int) -> None:
        (added,) = await store.add([vote(number)], Who())
        print(json.dumps([number, added.id]), flush=True)

    tasks = []
    while line := await lines.readline():
        tasks.append(asyncio.create_task(answer(int(line))))
    await asyncio.gather(*tasks)
    await store.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
