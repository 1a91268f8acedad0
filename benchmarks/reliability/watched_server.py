"""`trimtab` in plain asyncio, which notes the processor time of each callback that holds the event loop.

`WATCHED_FILE` names a file, to which a line of JSON is added for each callback that took longer than `MIN_SECONDS` of
processor time: what it was, for which path, and how much of it were garbage collections. Processor time does not depend
on what else the machine does.
"""

from __future__ import annotations

import asyncio.events
import gc
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from server import cli
from server.observability import request_record

MIN_SECONDS = 0.003


class Watch:
    def __init__(self, file: Path) -> None:
        self._file = file
        self._collecting = self._began = 0.0

    def start(self) -> None:
        gc.callbacks.append(self._collected)
        asyncio.events.Handle._run = self._around(asyncio.events.Handle._run)  # type: ignore[method-assign]

    def _around(self, run: Any) -> Any:
        def timed(handle: Any) -> None:
            self._collecting, began = 0.0, time.thread_time()
            run(handle)
            seconds = time.thread_time() - began
            if seconds > MIN_SECONDS:
                self._note(handle, seconds)

        return timed

    def _collected(self, phase: str, _info: dict[str, int]) -> None:
        if phase == "start":
            self._began = time.thread_time()
        else:
            self._collecting += time.thread_time() - self._began

    def _note(self, handle: Any, seconds: float) -> None:
        task = getattr(handle._callback, "__self__", None)
        what = task.get_coro().__qualname__ if isinstance(task, asyncio.Task) else repr(handle._callback)
        record = handle._context.get(request_record._current) if handle._context is not None else None
        line = {
            "ms": round(1000 * seconds, 1),
            "gc_ms": round(1000 * self._collecting, 1),
            "path": getattr(record, "path", None),
            "request_id": getattr(record, "id", None),
            "what": what,
        }
        with suppress(OSError), self._file.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(line)}\n")


if __name__ == "__main__":
    sys.modules["uvloop"] = None  # type: ignore[assignment]  # its callbacks cannot be seen
    Watch(Path(os.environ["WATCHED_FILE"])).start()
    cli.main()
