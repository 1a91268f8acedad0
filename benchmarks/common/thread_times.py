"""How long the threads of a server ran, and how long they waited for a processor, as the kernel counts it (Linux)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ENGINE = "trimtab-engine"


@dataclass(frozen=True, slots=True)
class ThreadTimes:
    """Seconds: of the engine's thread and those it made, of the event loop's (the process's first), of all others; and
    how long the first two were ready and no processor was free, which tells a busy machine."""

    engine: float
    loop: float
    others: float
    engine_waited: float
    loop_waited: float

    def __sub__(self, before: ThreadTimes) -> ThreadTimes:
        return ThreadTimes(*(getattr(self, name) - getattr(before, name) for name in self.__slots__))


def thread_times(pid: int) -> ThreadTimes:
    """So far. A thread that has ended is no longer counted."""
    ran = {"engine": 0.0, "loop": 0.0, "others": 0.0}
    waited = dict(ran)
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            name = (task / "comm").read_text().strip()
            on, off, _ = (task / "schedstat").read_text().split()  # nanoseconds, where `stat` has hundredths
        except (FileNotFoundError, ProcessLookupError):
            continue
        role = "engine" if name == ENGINE else "loop" if task.name == str(pid) else "others"
        ran[role] += int(on) / 1e9
        waited[role] += int(off) / 1e9
    return ThreadTimes(ran["engine"], ran["loop"], ran["others"], waited["engine"], waited["loop"])
