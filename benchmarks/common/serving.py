"""A server for benchmarks: `trimtab serve` in its own process, and concurrent requests to it on 127.0.0.1."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

STARTUP_S = 600
SLOTS = 64
CONCURRENCY = 2 * SLOTS
LIMITS = httpx.Limits(max_connections=CONCURRENCY)


@dataclass(frozen=True, slots=True)
class Server:
    url: str
    pid: int
    key: str = ""  # for clients that send one

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def generate_all(self, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """POST every body to /generate, `CONCURRENCY` at a time. Returns the responses in the order of the bodies."""
        return asyncio.run(self._generate_all(bodies))

    async def _generate_all(self, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        gate = asyncio.Semaphore(CONCURRENCY)
        async with httpx.AsyncClient(base_url=self.url, timeout=600, limits=LIMITS) as client:

            async def one(body: dict[str, Any]) -> dict[str, Any]:
                async with gate:
                    response = await client.post("/generate", json=body)
                if response.status_code != 200:
                    raise RuntimeError(f"{response.status_code}: {response.text}")
                answer: dict[str, Any] = response.json()
                return answer

            return await asyncio.gather(*(one(body) for body in bodies))


@contextmanager
def serving(
    model: str, profiles: Path, *, log: Path | None = None, module: str = "server.cli", **settings: Any
) -> Iterator[Server]:
    """Start the server, wait until it is ready, and stop it at the end. Its log goes into a file if one is given.
    `module` is run with the arguments of `trimtab`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"slots": SLOTS, "threads": 1, **settings}
    environment = {f"TRIMTAB_{key.upper()}": str(value) for key, value in settings.items()}
    command = [sys.executable, "-m", module, "serve", "--model", model, "--profiles", str(profiles)]
    with (Path(os.devnull) if log is None else log).open("wb") as written:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=written,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url, process)
        yield Server(url, process.pid)
    finally:
        process.terminate()
        process.wait(30)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + STARTUP_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode} before it was ready")
        try:
            if httpx.get(f"{url}/ready", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"the server was not ready after {STARTUP_S} s")
