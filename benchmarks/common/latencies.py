"""Rates and percentiles of latencies, from the events that clients received.

A wait between tokens is the time from one piece of text to the next. Nearly every token is a piece; `tokens per piece`
gives the exact ratio.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.common.load import Done, Spent

PERCENTILES = (50, 95, 99)


def pieces(done: Done) -> list[float]:
    """The arrival times of pieces of text."""
    return [came for came, event in done.reply.events() if _text(event)]


def first_waits(runs: Iterable[Done]) -> list[float]:
    """Seconds from each request's due time to its first piece of text."""
    return [pieces(done)[0] - done.due for done in runs]


def waits(runs: Iterable[Done]) -> list[float]:
    """Seconds between consecutive pieces of text, over all requests."""
    return [later - earlier for done in runs for earlier, later in pairwise(pieces(done))]


def check(runs: Iterable[Done]) -> None:
    """Raise RuntimeError for a request that failed, or has the wrong number of tokens or the wrong steering."""
    for done in runs:
        events = [event for _, event in done.reply.events()]
        usage = next(event["usage"] for event in reversed(events) if event.get("usage"))
        applied = next(event["steering"] for event in reversed(events) if event.get("steering") is not None)
        if usage["completion_tokens"] != done.job.tokens or usage["prompt_tokens"] != len(done.job.prompt):
            raise RuntimeError(f"{usage} where {len(done.job.prompt)} and {done.job.tokens} tokens were requested")
        if [(one["name"], one["strength"]) for one in applied] != list(done.job.steering):
            raise RuntimeError(f"a request was steered by {applied}, not by {done.job.steering}")


def figures(runs: Sequence[Done], spent: Spent) -> dict[str, Any]:
    """Rates per second, milliseconds of waits, and CPU time by thread."""
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
        "rows": round(sum(gaps) / spent.wall, 2),  # decoding at the same time, on average
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
    """Seconds during which at least one request was running."""
    total, until = 0.0, float("-inf")
    for done in sorted(runs, key=lambda done: done.due):
        total += max(0.0, done.reply.ended - max(done.due, until))
        until = max(until, done.reply.ended)
    return total


def processors(spent: Spent, tokens: int, steps: float) -> dict[str, Any]:
    """For each thread: its share of the run's wall time, milliseconds per 1,000 tokens, and milliseconds per step. The
    duration of a step is taken to be the mean wait between tokens."""
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
    """The text of an event of either route."""
    if "choices" in event:
        return "".join(choice["text"] for choice in event["choices"])
    return str(event.get("delta", ""))
