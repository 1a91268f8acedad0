"""Which threads torch's parallel sections use.

GNU's OpenMP keeps a team of workers for every thread that ever began a parallel section. Workers spin while all teams
together are no more than the processors; with a second team, every section waits 50 µs for workers to wake. So only one
thread, the engine's, has a lasting team.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from joblib import cpu_count

Result = TypeVar("Result")


def processors() -> int:
    """The default number of threads: torch's own, but no more than this process's affinity and its container's CPU
    quota allow.

    They are not pinned: pinning made a step of one row a third slower.
    """
    allowed: int = cpu_count()
    return min(torch.get_num_threads(), allowed)


def use_threads(count: int) -> None:
    """Set this thread's number of threads, whatever other threads set later."""
    torch.set_num_threads(count)
    torch.get_num_threads()  # a thread's first read takes the latest number that any thread has set


def run_apart(work: Callable[[], Result]) -> Result:
    """Run `work` in a thread of its own, whose team of workers ends with it. Raises what it raises.

    torch's number of threads is kept for each thread, and setting it changes the default of later threads; that default
    is restored.
    """
    threads = torch.get_num_threads()

    def with_threads() -> Result:
        use_threads(threads)
        return work()

    try:
        with ThreadPoolExecutor(1) as once:
            return once.submit(with_threads).result()
    finally:
        torch.set_num_threads(threads)
