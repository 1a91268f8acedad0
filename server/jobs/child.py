"""The process of one job: it runs the function of the job's kind at the lowest priority, and sends what happens.

It reads one line of JSON from its standard input, which stays open: when it ends, the worker is gone, and so is this
process at once. Messages are lines of JSON on a descriptor of their own, because libraries print. What they print is
the job's log.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from server.jobs.job import JobProgress, JobResult, JobSettings, ServedModel, failure_of
from server.jobs.kinds import imported
from server.profiles.audit import Author
from steering_vectors.errors import TrimtabError, first_line
from steering_vectors.progress import ProgressLines

LOWEST_PRIORITY = 19
MESSAGE_SECONDS = 0.25  # between two messages about one stage
PATHS = ("folder", "base", "profiles", "audit_log")  # of the settings
LOST = 3  # the exit code of a child whose worker is gone


def main() -> None:
    """The child's main function. Its arguments are the descriptor of messages, and the function as MODULE:FUNCTION."""
    for number in (signal.SIGINT, signal.SIGTERM):  # of a terminal or a supervisor, to all processes: the worker acts
        signal.signal(number, signal.SIG_IGN)
    descriptor, function = int(sys.argv[1]), sys.argv[2]
    with suppress(OSError):
        os.nice(LOWEST_PRIORITY)
    settings = read_settings(json.loads(sys.stdin.buffer.readline()))
    threading.Thread(target=_leave_with_worker, args=(sys.stdin.buffer,), daemon=True).start()
    with os.fdopen(descriptor, "w", encoding="utf-8") as messages:
        send = Messages(messages)
        try:
            result: JobResult = imported(function)(settings, send.progress)
        except TrimtabError as error:
            print(f"error: {error}", file=sys.stderr)
            send.put({"error": failure_of(error)})
        except Exception as error:
            traceback.print_exc()
            what = f"{type(error).__name__}: {first_line(error)}"
            message = f"the job ended in an error that it should not ({what[:500]}): its log has the details"
            send.put({"error": {"code": "internal_error", "message": message}})
        else:
            file = None if result.file is None else str(result.file)
            send.put({"result": {"figures": _finite(dict(result.figures)), "file": file}})
    sys.stdout.flush()
    os._exit(0)  # libraries' threads are not waited for


class Messages:
    """Writes messages to the worker. Progress is written seldom, and also as lines of the log."""

    def __init__(self, out: Any) -> None:
        self._out = out
        self._lines = ProgressLines(lambda line: print(line, flush=True))
        self._sent: dict[str, float] = {}

    def put(self, message: Mapping[str, Any]) -> None:
        """Raises OSError if the worker is gone."""
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def progress(self, stage: str, done: int, total: int, /, detail: str = "") -> None:
        self._lines(stage, done, total, detail)
        now = time.monotonic()
        if done < total and now - self._sent.get(stage, -MESSAGE_SECONDS) < MESSAGE_SECONDS:
            return
        self._sent[stage] = now
        self.put({"progress": JobProgress(stage=stage, done=done, total=total, detail=detail)})


def written_settings(settings: JobSettings) -> dict[str, Any]:
    """Settings as JSON."""
    found = asdict(settings)
    for name in PATHS:
        found[name] = None if found[name] is None else str(found[name])
    return found


def read_settings(found: Mapping[str, Any]) -> JobSettings:
    paths = {name: None if found[name] is None else Path(found[name]) for name in PATHS}
    parts = {"model": ServedModel(**found["model"]), "author": Author(**found["author"])}
    return JobSettings(**{**found, **paths, **parts})


def _finite(value: Any) -> Any:
    """The value, with null for numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _finite(one) for name, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def _leave_with_worker(stdin: BinaryIO) -> None:
    """End the process when the worker's end of the pipe is closed, also by its death."""
    with suppress(OSError):
        while stdin.read(1024):
            pass
    os._exit(LOST)


if __name__ == "__main__":
    main()
