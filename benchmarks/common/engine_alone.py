"""The engine in its own process, without a server, as the reference for HTTP benchmarks.

`EngineAlone` starts the process and sends it jobs. The process runs them in closed loops and discards their events
after receiving them as the server's event loop would.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.common.jobs import Job, Target
from benchmarks.common.thread_times import ThreadTimes, thread_times
from server.engines.protocol import GenerationRequest
from server.engines.torch.build import build_engine
from server.engines.torch.engine import TorchEngine
from server.settings import Settings
from steering_vectors.profiles.files import load_profile
from steering_vectors.runtime.cpu.threads import run_apart

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Alone:
    """The seconds of a run, and its number of steps."""

    wall: float
    steps: int
    threads: ThreadTimes


@dataclass(frozen=True, slots=True)
class EngineAlone:
    process: subprocess.Popen[str]

    def run(self, jobs: Sequence[Job], streams: int) -> Alone:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"streams": streams, "jobs": [asdict(job) for job in jobs]}) + "\n")
        self.process.stdin.flush()
        if not (line := self.process.stdout.readline()):
            raise RuntimeError("the engine's process ended; its errors are above")
        told = json.loads(line)
        return Alone(told["wall"], told["steps"], ThreadTimes(**told["threads"]))


@contextmanager
def engine_alone(target: Target, **settings: Any) -> Iterator[EngineAlone]:
    """An engine with the settings of a server."""
    given = json.dumps({"model": target.source, "profiles": str(target.profiles), **settings})
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.common.engine_alone", given],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield EngineAlone(process)
    finally:
        process.communicate(timeout=30)  # it exits at the end of its input


async def _serve(settings: Settings) -> None:
    engine = run_apart(lambda: build_engine(settings.engine_config()))
    profiles = {path.stem: load_profile(path) for path in settings.profiles.iterdir()}
    for profile in profiles.values():
        await engine.load_profile(profile)
    while line := await asyncio.to_thread(sys.stdin.readline):
        told = json.loads(line)
        jobs = [Job.of(one) for one in told["jobs"]]
        requests = [job.request(f"alone-{number}", profiles) for number, job in enumerate(jobs)]
        print(json.dumps(await _run(engine, iter(requests), told["streams"])), flush=True)
    await engine.close()


async def _run(engine: TorchEngine, requests: Iterator[GenerationRequest], streams: int) -> dict[str, Any]:
    async def loop() -> None:
        for request in requests:
            async for _ in await engine.submit([request]):
                pass

    threads, steps, wall = thread_times(os.getpid()), engine.stats().steps, perf_counter()
    await asyncio.gather(*(loop() for _ in range(streams)))
    wall = perf_counter() - wall
    spent = thread_times(os.getpid()) - threads
    return {"wall": wall, "steps": engine.stats().steps - steps, "threads": asdict(spent)}


if __name__ == "__main__":
    asyncio.run(_serve(Settings(**json.loads(sys.argv[1]))))
