"""CPU time of a server's threads, and their time waiting for a processor, from Linux's scheduler statistics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ENGINE = "trimtab-engine"


@dataclass(frozen=True, slots=True)
class ThreadTimes:
    """CPU seconds of the engine's thread with the threads it started, of the event loop (the main thread), and of all
    others; and the seconds that the first two waited for a free processor, which are high on a busy machine."""

    engine: float
    loop: float
    others: float
    engine_waited: float
    loop_waited: float

    def __sub__(self, before: ThreadTimes) -> ThreadTimes:
        return ThreadTimes(*(getattr(self, name) - getattr(before, name) for name in self.__slots__))


def thread_times(pid: int) -> ThreadTimes:
    """The times until now, without threads that have ended."""
    ran = {"engine": 0.0, "loop": 0.0, "others": 0.0}
    waited = dict(ran)
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            name = (task / "comm").read_text().strip()
            on, off, _ = (task / "schedstat").read_text().split()  # nanoseconds; `stat` has hundredths of a second
        except (FileNotFoundError, ProcessLookupError):
            continue
        role = "engine" if name == ENGINE else "loop" if task.name == str(pid) else "others"
        ran[role] += int(on) / 1e9
        waited[role] += int(off) / 1e9
    return ThreadTimes(ran["engine"], ran["loop"], ran["others"], waited["engine"], waited["loop"])
