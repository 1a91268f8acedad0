"""How long /health waits while a server is sent hostile bodies.

    python -m benchmarks.reliability.hostile [--model demo] [--count 10000] [--seed 0] [--callbacks]

Bodies are deep, wide, repeated, at the limit of every field or of the wrong type, some of them valid. A probe asks
/health every 20 ms. Printed are the answers by status, the longest wait of the probe, and the server's memory after
some bodies that warm it up and after each fifth of the others. It fails if any answer is a 5xx but a 503.

The longest wait is that of the whole machine, and says something only if nothing else runs. `--callbacks` measures the
processor time for which each callback holds the event loop instead, and prints those that hold it longest.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from benchmarks.common.serving import serving

PROBE_S = 0.02
SENDERS = 4
WARM_UP = 300  # bodies
PARTS = 5
SHOWN = 15  # callbacks
LINE = [{"from_token": 0, "strength": 0}, {"from_token": 4096, "strength": 1}]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Answers by status, and the longest wait of the probe in seconds."""

    statuses: Counter[int]
    longest_wait: float


def hostile(seed: int, count: int, *, size: int = 20_000) -> Iterator[tuple[str, bytes]]:
    """Routes and bodies; `size` bounds the entries of lists and objects."""
    draw = random.Random(seed)
    forms: list[Callable[[int], tuple[str, Any]]] = [
        lambda n: ("/generate", b"[" * n + b"]" * n),
        lambda n: ("/generate", b'{"a":' * n + b"1" + b"}" * n),
        lambda n: ("/generate", b"{" + b",".join(b'"%d":0' % place for place in [*range(n), n - 1]) + b"}"),
        lambda n: ("/generate", {f"x{place}": place for place in range(n)}),
        lambda n: ("/generate", {"prompt": "ab" * 50 * n, "max_tokens": 1}),
        lambda n: ("/generate", {"prompt": [1] * n, "max_tokens": 1}),
        lambda n: ("/generate", {"messages": [{"role": "user", "content": "a"}] * n, "max_tokens": 1}),
        lambda n: ("/generate", {"prompt": "a", "guided_json": _nested(n % 250), "max_tokens": 2}),
        lambda n: ("/generate", {"prompt": "a", "guided_grammar": _chain(n % 600), "max_tokens": 2}),
        lambda n: ("/generate", {"prompt": "a", "guided_regex": "(" * n + ")" * n, "max_tokens": 2}),
        lambda n: ("/generate", {"prompt": "a", "stop": ["a" * n] * (n % 20), "max_tokens": 2}),
        lambda n: ("/generate", {"prompt": "a", "logit_bias": {str(place): 1 for place in range(n)}}),
        lambda n: ("/steering/resolve", {"steering": "+".join(f"a{place}" for place in range(n))}),
        lambda n: ("/steering/resolve", {"steering": {"profiles": [{"name": "warm", "layers": [5] * n}]}}),
        lambda n: ("/steering/resolve", {"steering": {"profiles": [{"name": "warm", **_line()}] * (n % 70)}}),
        lambda n: ("/v1/completions", {"model": "demo:" + "warm+" * n, "prompt": "a"}),
        lambda n: ("/v1/completions", {"model": "demo", "prompt": ["a"] * n, "n": 128, "logprobs": 20}),
        lambda n: ("/v1/completions", {"model": "demo", "prompt": "a", "user": "x" * n, "metadata": {"a": "b" * n}}),
        lambda n: ("/v1/completions", {"model": "demo", "prompt": "a", "max_tokens": 1, "n": n % 9 + 1}),
        lambda n: ("/score", {"prompt": "a", "completions": ["a"] * n, "top_logprobs": 20}),
        lambda n: ("/score", {"prompt": "a", "completions": ["b" * n]}),
    ]
    for _ in range(count):
        path, body = draw.choice(forms)(draw.choice([1, 3, 60, 130, 1500, size]))
        yield path, body if isinstance(body, bytes) else json.dumps(body).encode()


def attack(url: str, bodies: Iterable[tuple[int, tuple[str, bytes]]]) -> Outcome:
    """Send all bodies, by their number, a few at a time, and probe meanwhile."""
    waits, stop = [0.0], threading.Event()

    def probe() -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not stop.wait(PROBE_S):
                began = time.perf_counter()
                client.get("/health").raise_for_status()
                waits.append(time.perf_counter() - began)

    with ThreadPoolExecutor(SENDERS + 1) as pool, httpx.Client(base_url=url, timeout=120) as client:

        def send(given: tuple[int, tuple[str, bytes]]) -> int:
            place, (path, body) = given
            headers = {"content-type": "application/json", "x-request-id": f"hostile-{place}"}
            return client.post(path, content=body, headers=headers).status_code

        probing = pool.submit(probe)
        try:
            statuses = Counter(pool.map(send, bodies))
        finally:
            stop.set()
        probing.result()
    return Outcome(statuses, max(waits))


def main(
    model: Annotated[str, typer.Option(help="The model, as in `trimtab serve`.")] = "demo",
    count: Annotated[int, typer.Option(help="Bodies.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Chooses the bodies.")] = 0,
    callbacks: Annotated[bool, typer.Option("--callbacks", help="Time what holds the event loop.")] = False,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        profiles, found = Path(folder) / "profiles", Path(folder) / "callbacks"
        profiles.mkdir()
        settings = {"module": "benchmarks.reliability.watched_server"} if callbacks else {}
        os.environ["WATCHED_FILE"] = str(found)
        with serving(model, profiles, **settings) as server:
            attack(server.url, enumerate(hostile(seed + 1, WARM_UP)))
            found.unlink(missing_ok=True)
            memory, parts = [_resident(server.pid)], []
            bodies = list(enumerate(hostile(seed, count)))
            for part in range(PARTS):
                parts.append(attack(server.url, bodies[part * count // PARTS : (part + 1) * count // PARTS]))
                memory.append(_resident(server.pid))
        longest = [json.loads(line) for line in found.read_text().splitlines()] if found.exists() else []
    statuses = sum((part.statuses for part in parts), Counter[int]())
    print(f"answers: {dict(sorted(statuses.items()))}")
    print(f"longest wait of /health: {1000 * max(part.longest_wait for part in parts):.0f} ms")
    print(f"memory in MiB: {[round(held / 1024, 1) for held in memory]}")
    for one in sorted(longest, key=lambda one: -float(one["ms"]))[:SHOWN]:
        print(json.dumps(one))
    if failed := [status for status in statuses if status >= 500 and status != 503]:
        raise SystemExit(f"answers of {failed}")


def _line() -> dict[str, Any]:
    return {"schedule": LINE, "interpolation": "linear"}


def _nested(depth: int) -> Any:
    schema: Any = {}
    for _ in range(depth):
        schema = {"a": schema}
    return schema


def _chain(count: int) -> str:
    return "\n".join(["start: r0", *(f"r{place}: r{place + 1}" for place in range(count)), f'r{count}: "x"'])


def _resident(pid: int) -> int:
    """KiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


if __name__ == "__main__":
    typer.run(main)
