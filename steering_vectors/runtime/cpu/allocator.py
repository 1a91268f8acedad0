"""Memory that tensors free stays with the process, because the next step needs as much again.

glibc gives freed memory back to the system once more than a little is free at the end of the heap. Each temporary
tensor of some megabytes, such as the log-probabilities of a batch, is then made of new pages, and touching them first
costs more than computing it: KL of 32 rows of 49,152 tokens took 19 ms, and 6 ms without that.
"""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
KEPT = 2**28  # bytes that may be free at the end of the heap
LARGEST = (
    2**25
)  # bytes of an allocation from the heap, the most that glibc allows; larger ones are mapped by themselves


def keep_freed_memory() -> bool:
    """Let the C library keep up to 256 MiB of freed memory, and return whether it does.

    It does not where it is not glibc, or where the environment sets its thresholds.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return bool(library.mallopt(M_MMAP_THRESHOLD, LARGEST) and library.mallopt(M_TRIM_THRESHOLD, KEPT))
