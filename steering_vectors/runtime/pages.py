"""Zeros that take memory on a CPU page by page, as they are written.

torch writes its zeros at once. numpy asks for huge pages: the first token of a slot then takes megabytes in every
layer, and the first requests wait for them.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from contextlib import suppress

import torch

IS_LINUX = sys.platform == "linux"
PRIVATE = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}


def zeros(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Zeros of the dtype and device of `like`."""
    size = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or size == 0:
        return like.new_zeros(shape)
    memory = mmap.mmap(-1, size, **PRIVATE)
    if IS_LINUX:
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)


def clear(part: torch.Tensor) -> None:
    """Set a contiguous part of `zeros` to zero again, and return its whole pages to the system."""
    if part.device.type != "cpu" or not IS_LINUX:
        part.zero_()
        return
    octets = part.view(-1).view(torch.uint8)
    address, size = octets.data_ptr(), len(octets)
    first = min(size, -address % mmap.PAGESIZE)
    last = max(first, size - (address + size) % mmap.PAGESIZE)
    octets[:first] = 0
    octets[last:] = 0
    if first < last and ctypes.CDLL(None).madvise(
        ctypes.c_void_p(address + first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED
    ):
        octets[first:last] = 0
