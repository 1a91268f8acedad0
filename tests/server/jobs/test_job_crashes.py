"""kill -9 of whole servers, `trimtab serve --jobs`, on both databases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.jobs.conftest import wait

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PAIRS = [
    {"prompt": f"How do I bake bread number {n}?", "chosen": f"Gladly! Mix {n}.", "rejected": f"No. Buy {n}."}
    for n in range(40)
]


class Killable:
    """A server in a process of its own. `kill` ends it by kill -9."""

    def __init__(self, url: str, directory: Path) -> None:
        self._command = [
            *(sys.executable, "-m", "server.cli", "serve", "--model", "demo", "--port", "0", "--jobs"),
            *("--profiles", str(directory / "profiles"), "--feedback-database", url),
        ]
        self._environment = {**os.environ, "TMPDIR": str(directory)}

    @contextmanager
    def running(self) -> Iterator[tuple[httpx.Client, subprocess.Popen[str]]]:
        process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True, env=self._environment)
        assert process.stdout is not None
        try:
            address = process.stdout.readline().split()[-1]
            with httpx.Client(base_url=address, timeout=60) as client:
                yield client, process
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def test_a_killed_server_finishes_its_job_when_it_is_back(url: str, tmp_path: Path) -> None:
    """Killed while the job runs, and again at the moment when its profile is made; then it may end."""
    server = Killable(url, tmp_path)
    directory = tmp_path / "profiles"
    with server.running() as (client, process):
        body = {"pairs": PAIRS, "layers": "4", "text_tokens": 0}
        job: str = client.post("/profiles/warm/fit", json=body).json()["id"]
        wait(lambda: client.get(f"/jobs/{job}").json()["state"] == "running")
        process.kill()
    with server.running() as (client, process):
        shown = client.get(f"/jobs/{job}").json()
        assert shown["state"] in ("queued", "running")
        made = directory / ".trimtab" / "jobs" / job / "warm.safetensors"
        wait(made.exists)
        process.kill()
    with server.running() as (client, process):
        with client.stream("GET", f"/jobs/{job}/events") as stream:
            events: list[dict[str, Any]] = [json.loads(line[6:]) for line in stream.iter_lines() if line]
        end = events[-1]
        assert end["state"] == "succeeded", end
        assert client.get("/profiles/warm").json()["version"] == end["version"]
        uploads = [one for one in client.get("/audit").json()["changes"] if one["action"] == "upload"]
        assert [one["to_version"] for one in uploads] == [end["version"]]
        assert [one["request_id"] for one in uploads] == [job]
        assert [path.name for path in directory.glob("*.safetensors")] == ["warm.safetensors"]
        assert list(directory.glob(".trimtab/uploads/*")) == []
        worker = worker_of(process.pid)
        process.terminate()
        assert process.wait(60) == 0
        wait(lambda: not Path(f"/proc/{worker}").exists())


def worker_of(server: int) -> int:
    """The process that the server has started."""
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    return next(int(one) for one in children if b"server.jobs.worker" in Path(f"/proc/{one}/cmdline").read_bytes())
