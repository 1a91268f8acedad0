"""Freed memory stays with the process, unless the environment says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's thresholds")

# Page faults of a temporary tensor of 12 MiB that is made and freed twenty times, after the first ten.
FAULTS = """
import resource, torch
from steering_vectors.runtime.cpu.allocator import keep_freed_memory
torch.set_num_threads(1)
kept = keep_freed_memory()
def used():
    torch.ones(2**20 * 3).exp().sum()
for _ in range(10):
    used()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    used()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment: str) -> tuple[bool, int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", FAULTS]
    found = subprocess.run(
        command, capture_output=True, text=True, check=True, env=clean | environment, cwd=Path(__file__).parents[4]
    )
    kept, count = found.stdout.split()
    return kept == "True", int(count)


@pytest.mark.skipif(os.confstr("CS_GNU_LIBC_VERSION") is None, reason="not glibc")
def test_freed_memory_is_used_again() -> None:
    """A tensor of 12 MiB has 3,072 pages of 4 KiB."""
    kept, count = faults()
    assert kept
    assert count < 3072
    kept, count = faults(MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072")
    assert not kept
    assert count > 20 * 3072
