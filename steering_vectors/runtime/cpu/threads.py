"""Which threads torch's parallel sections may use.

GNU's OpenMP keeps a team of workers for every thread that ever began a parallel section, and lets workers wait awake
only while all teams together are no more than the processors: a second team makes every section wait for workers to be
woken, 50 µs each. So one thread alone, the engine's, has a team that lasts.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from joblib import cpu_count

Result = TypeVar("Result")


def processors() -> int:
    """How many threads to compute with where nobody says: as many as torch would, and no more than this process's
    affinity and its container's quota of processor time allow.

    They are not pinned to processors, which made a step of one row a third slower.
    """
    allowed: int = cpu_count()
    return min(torch.get_num_threads(), allowed)


def use_threads(count: int) -> None:
    """Give this thread so many threads, whatever others set later."""
    torch.set_num_threads(count)
    torch.get_num_threads()  # a thread's first question for its number takes the latest that any thread has set


def run_apart(work: Callable[[], Result]) -> Result:
    """Run `work` in a thread that ends with it, and so does its team. Raises what it raises.

    torch's number of threads is each thread's own, and what one sets is the default of those that come later: that is
    left as it was.
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
