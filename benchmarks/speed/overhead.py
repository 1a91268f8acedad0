"""What keys, limits, metrics and logs cost together, in throughput and in time of the event loop.

    python -m benchmarks.speed.overhead [--model demo] [--streams 16] [--pairs 5] [--json FILE]

Two servers of the same model run alternately: one with a key file, budgets, metrics and a log in JSON, the other
without them and without the middleware. The figures of each pair are compared, as the machine differs between pairs.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks.common.jobs import Target, make_jobs, target
from benchmarks.common.load import Client
from benchmarks.common.serving import Server, serving
from server.access.keys import add_key

LARGE = 10**9  # budgets that are counted and never used up
SECONDS = 300.0  # maximum time of a run


@contextmanager
def both(made: Target, settings: dict[str, Any]) -> Iterator[dict[str, Server]]:
    """The two servers, of which only one has work at a time."""
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys"
        secret, _ = add_key(
            keys, "bench", requests_per_minute=LARGE, tokens_per_minute=LARGE, concurrent_requests=LARGE
        )
        guarded = {**settings, "api_key_file": keys, "log_format": "json"}
        with (
            serving(made.source, made.profiles, log=Path(folder) / "log", **guarded) as whole,
            serving(made.source, made.profiles, module="benchmarks.speed.bare_server", **settings) as bare,
        ):
            yield {"with": replace(whole, key=secret), "without": bare}


def run(made: Target, server: Server, streams: int, requests: int, tokens: int, seed: int) -> dict[str, float]:
    """One run: output tokens per second, and microseconds of the event loop for each event of a stream."""
    jobs = make_jobs(made, requests, prompts=(8, 32), completions=(tokens, tokens), seed=seed)
    client = Client(server, made, "generate", SECONDS)
    done, spent = client.timed(client.streams(jobs, streams))
    events = sum(sum(1 for _ in one.reply.events()) for one in done)
    assert len(done) == requests, "it took longer than the maximum time"
    return {"tokens_per_s": requests * tokens / spent.wall, "loop_us_per_event": 1e6 * spent.threads.loop / events}


def main(
    model: Annotated[str, typer.Option(help="demo, a directory, or a shape with random weights.")] = "demo",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    streams: Annotated[int, typer.Option(help="Number of concurrent closed loops.")] = 16,
    requests: Annotated[int, typer.Option(help="Number of requests in each run.")] = 96,
    tokens: Annotated[int, typer.Option(help="Tokens of each request.")] = 96,
    pairs: Annotated[int, typer.Option(help="How many pairs.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    settings = {"slots": streams, "threads": threads, "dtype": dtype, "context": 256}
    found: list[dict[str, dict[str, float]]] = []
    with target(model, dtype=dtype, profiles=4) as made, both(made, settings) as servers:
        for server in servers.values():
            run(made, server, streams, streams, tokens, seed=0)  # warms up
        for pair in range(pairs):
            order = ("with", "without") if pair % 2 else ("without", "with")
            found.append({side: run(made, servers[side], streams, requests, tokens, seed=1 + pair) for side in order})
            print(json.dumps(found[-1]), flush=True)
    for figure in ("tokens_per_s", "loop_us_per_event"):
        ratios = sorted(pair["with"][figure] / pair["without"][figure] for pair in found)
        print(f"{figure}: with/without {median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f} in {pairs} pairs)")
    if out is not None:
        out.write_text(json.dumps({"model": model, **settings, "streams": streams, "pairs": found}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
