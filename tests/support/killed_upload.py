"""A process that is killed in the middle of an upload: `python -m tests.support.killed_upload DIRECTORY FILE`.

It prints how many lines of the server's and the profile's code an upload of FILE into DIRECTORY has, and then reads
points: numbers of such lines from the beginning. For each, a child with a tiny model uploads FILE into DIRECTORY-POINT
and kills itself there, and the signal that ended it is printed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from types import FrameType
from typing import Any

from server.engines.config import EngineConfig
from server.engines.torch.engine import TorchEngine
from server.profiles.audit import Author
from server.profiles.changes import ProfileChanges
from server.profiles.directory_changes import Conditions
from server.profiles.registry import ProfileRegistry
from server.profiles.versions import ProfileStore
from steering_vectors.models.loading import wrap_model
from tests.support.tiny import tiny_model, tiny_tokenizer

COUNTED = ("server/profiles/", "steering_vectors/profiles/files.py")


class Killer:
    """Counts lines in all threads, and kills the process at one of them."""

    def __init__(self, point: int | None) -> None:
        self._point = point
        self.lines = 0

    def start(self) -> None:
        threading.settrace(self._trace)
        sys.settrace(self._trace)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not any(part in frame.f_code.co_filename for part in COUNTED):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self._point:
                os.kill(os.getpid(), signal.SIGKILL)
        return self._trace


async def chunks(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), 1000):
        yield data[start : start + 1000]


async def upload(directory: Path, file: Path, point: int | None) -> int:
    """Upload a file to a new server of a directory; returns the lines that it took."""
    engine = TorchEngine(wrap_model(tiny_model("llama"), tiny_tokenizer(), name="tiny"), EngineConfig(slots=2))
    store = ProfileStore(directory)
    registry = ProfileRegistry(directory, engine, interval=60, store=store)
    await registry.start()
    changes = ProfileChanges(store, registry, engine)
    killer = Killer(point)
    killer.start()
    await changes.upload(file.stem, chunks(file.read_bytes()), Conditions(), Author("team"))
    sys.settrace(None)
    await engine.close()
    return killer.lines


def main() -> None:
    directory, file = sys.argv[1:]
    in_child(directory, file, None)
    for point in sys.stdin.read().split():
        print(in_child(f"{directory}-{point}", file, int(point)), flush=True)


def in_child(directory: str, file: str, point: int | None) -> int:
    """Upload in a fork of this process. Returns the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        print(asyncio.run(upload(Path(directory), Path(file), point)), flush=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


if __name__ == "__main__":
    main()
