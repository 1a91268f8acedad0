"""Workers of parallel sections spin while they wait, but not while other processes want the processors.

A spinning worker is quick to begin the next section, and on processors that nobody else wants it costs nothing. On a
shared machine it runs in place of the worker it waits for, and a pass takes ten times as long or more. GNU's OpenMP
spins 100 rounds in place of 300,000 while the teams of a process together have more workers than there are processors,
so a second team that does nothing is a switch. Other OpenMP libraries take no notice.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INTERVAL = 0.5  # seconds between measurements
SHARED, FREE = 0.15, 0.03  # seconds that this process's threads waited for a processor, in each second
CALM = 4  # measurements in a row below FREE, until workers spin again
BUSY = 0.25  # seconds of processor time in each second below which a measurement says nothing
TASKS = Path("/proc/self/task")

_lock = threading.Lock()
_users = 0
_watch: _Watch | None = None


@contextmanager
def spinning_unless_shared() -> Iterator[None]:
    """Watch inside whether other processes want the processors. Does nothing where the system does not tell."""
    global _users, _watch
    with _lock:
        _users += 1
        if _watch is None and seconds_waited() is not None:
            _watch = _Watch()
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            ended, _watch = (_watch, None) if _users == 0 else (None, _watch)
        if ended is not None:
            ended.close()


def seconds_waited() -> float | None:
    """Seconds that the living threads of this process could have run and had no processor; None if unknown."""
    total = 0
    try:
        for task in TASKS.iterdir():
            try:
                total += int((task / "schedstat").read_text().split()[1])
            except (FileNotFoundError, ProcessLookupError):  # the thread has ended
                continue
    except (OSError, IndexError, ValueError):
        return None
    return total / 1e9


class _Watch:
    """A thread that measures, and holds the second team while the processors are shared."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trimtab-spinning", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        team: SecondTeam | None = None
        before, calm = _now(), 0
        try:
            while not self._stop.wait(INTERVAL):
                now = _now()
                elapsed, waited, used = (new - old for new, old in zip(now, before, strict=True))
                before = now
                if used > BUSY * elapsed:
                    calm = calm + 1 if waited < FREE * elapsed else 0
                if team is None and waited > SHARED * elapsed and "torch" in sys.modules:
                    team = SecondTeam()
                elif team is not None and calm >= CALM:
                    team.close()
                    team = None
        finally:
            if team is not None:
                team.close()


def _now() -> tuple[float, float, float]:
    """Seconds: of the clock, waited for a processor, and computed."""
    return time.monotonic(), seconds_waited() or 0.0, time.process_time()


class SecondTeam:
    """A thread with a team of workers as large as there are processors, which do nothing until it is closed."""

    def __init__(self) -> None:
        self._stop, begun = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._hold, args=(begun,), name="trimtab-second-team", daemon=True)
        self._thread.start()
        begun.wait()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _hold(self, begun: threading.Event) -> None:
        try:
            import torch  # here, as commands that need no torch never load it

            from steering_vectors.runtime.cpu.threads import processors, use_threads

            default = torch.get_num_threads()
            use_threads(processors())
            torch.zeros(2**20).add_(1)  # a parallel section, which makes the team
            torch.set_num_threads(default)
        finally:
            begun.set()
        self._stop.wait()
