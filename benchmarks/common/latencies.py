"""From what clients saw of a run to figures: rates, and percentiles of the waits.

A wait between tokens is the time from one piece of text to the next; nearly every token is a piece, and `tokens per
piece` says how nearly. Knows nothing of how the load was made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.common.load import Done, Spent

PERCENTILES = (50, 95, 99)


def pieces(done: Done) -> list[float]:
    """When pieces of text came."""
    return [came for came, event in done.reply.events() if _text(event)]


def first_waits(runs: Iterable[Done]) -> list[float]:
    """Seconds from when each request was due to its first piece of text."""
    return [pieces(done)[0] - done.due for done in runs]


def waits(runs: Iterable[Done]) -> list[float]:
    """Seconds between one piece of text and the next, of all requests."""
    return [later - earlier for done in runs for earlier, later in pairwise(pieces(done))]


def check(runs: Iterable[Done]) -> None:
    """Raise RuntimeError for a request that was not answered as it was asked for."""
    for done in runs:
        events = [event for _, event in done.reply.events()]
        usage = next(event["usage"] for event in reversed(events) if event.get("usage"))
        applied = next(event["steering"] for event in reversed(events) if event.get("steering") is not None)
        if usage["completion_tokens"] != done.job.tokens or usage["prompt_tokens"] != len(done.job.prompt):
            raise RuntimeError(f"{usage} where {len(done.job.prompt)} and {done.job.tokens} tokens were asked for")
        if [(one["name"], one["strength"]) for one in applied] != list(done.job.steering):
            raise RuntimeError(f"steered by {applied}, not by {done.job.steering}")


def figures(runs: Sequence[Done], spent: Spent) -> dict[str, Any]:
    """Rates a second, milliseconds of waits, and where the processors' time went."""
    check(runs)
    tokens, gaps = sum(done.job.tokens for done in runs), waits(runs)
    steps = busy_seconds(runs) * len(gaps) / sum(gaps) if gaps else 1.0
    return {
        "requests": len(runs),
        "prompt_tokens": sum(len(done.job.prompt) for done in runs),
        "output_tokens": tokens,
        "seconds": round(spent.wall, 3),
        "requests_per_second": round(len(runs) / spent.wall, 3),
        "output_tokens_per_second": round(tokens / spent.wall, 1),
        "tokens_per_piece": round(tokens / (len(gaps) + len(runs)), 4),
        "rows": round(sum(gaps) / spent.wall, 2),  # that decode, on average
        "first_token_ms": percentiles(first_waits(runs)),
        "between_tokens_ms": percentiles(gaps),
        "processors": processors(spent, tokens, steps),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    found = np.percentile(1e3 * np.array(seconds), PERCENTILES)
    return {f"p{rank}": round(float(value), 3) for rank, value in zip(PERCENTILES, found, strict=True)}


def busy_seconds(runs: Sequence[Done]) -> float:
    """How long at least one request was under way."""
    total, until = 0.0, float("-inf")
    for done in sorted(runs, key=lambda done: done.due):
        total += max(0.0, done.reply.ended - max(done.due, until))
        until = max(until, done.reply.ended)
    return total


def processors(spent: Spent, tokens: int, steps: float) -> dict[str, Any]:
    """Of each thread: the part of the run in which it computed, milliseconds for 1,000 tokens, and milliseconds in a
    step. A step is taken to last as long as the mean wait between tokens."""
    threads = spent.threads
    parts = {"engine": threads.engine, "event loop": threads.loop, "others": threads.others, "client": spent.client}
    return {
        name: {
            "of_wall": round(seconds / spent.wall, 4),
            "ms_per_1000_tokens": round(1e6 * seconds / tokens, 1),
            "ms_per_step": round(1e3 * seconds / steps, 4),
        }
        for name, seconds in parts.items()
    } | {
        "waited_for_a_processor": {
            "engine": round(threads.engine_waited / spent.wall, 4),
            "event loop": round(threads.loop_waited / spent.wall, 4),
        }
    }


def _text(event: dict[str, Any]) -> str:
    """Of an event of either route."""
    if "choices" in event:
        return "".join(choice["text"] for choice in event["choices"])
    return str(event.get("delta", ""))
