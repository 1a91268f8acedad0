"""The worker's process, as the server sees it: started, started again when it dies, and told to end."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from server.jobs.worker import WorkerSettings, written

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 15.0
STEADY_SECONDS = 30.0  # after which a worker that dies is started again at once
MAX_RESTART_DELAY_S = 30.0


class WorkerProcess:
    """Keeps one worker running, beside the event loop."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self.restarts = 0

    @property
    def pid(self) -> int | None:
        """None while there is no worker."""
        process = self._process
        return None if process is None or process.returncode is not None else process.pid

    def start(self) -> None:
        self._keeper = asyncio.create_task(self._keep(), name="trimtab-jobs-worker")

    async def close(self) -> None:
        """Have the worker stop its jobs and end. They are queued again."""
        if self._keeper is None:
            return
        self._keeper.cancel()
        await asyncio.gather(self._keeper, return_exceptions=True)
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), CLOSE_SECONDS)
        except TimeoutError:
            logger.error("the worker of jobs does not end: it is killed")
            process.kill()
            await process.wait()

    async def _keep(self) -> None:
        delay = 0.0
        while True:
            began = time.monotonic()
            try:
                code = await self._run()
            except OSError as error:
                code = error.errno or 1
            self.restarts += 1
            delay = 0.0 if time.monotonic() - began > STEADY_SECONDS else min(2 * delay + 0.5, MAX_RESTART_DELAY_S)
            logger.error("the worker of jobs ended (%d); it is started again in %.1f s", code, delay)
            await asyncio.sleep(delay)

    async def _run(self) -> int:
        """Start a worker with the same import path, and return its exit code."""
        path = os.pathsep.join(place or str(Path.cwd()) for place in sys.path)
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            "from server.jobs.worker import main; main()",
            stdin=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C is the server's to handle
            env={**os.environ, "PYTHONPATH": path},
        )
        assert process.stdin is not None
        with suppress(ConnectionError):  # it died
            process.stdin.write(written(self._settings))
            await process.stdin.drain()
        return await process.wait()
