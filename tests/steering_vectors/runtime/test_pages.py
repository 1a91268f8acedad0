"""Zeros that take memory as they are written, and the slot cache that is made of them."""

from __future__ import annotations

import mmap
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from steering_vectors.runtime.pages import clear, zeros
from steering_vectors.runtime.slot_cache import AttentionMetadata, SlotCache

only_linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is counted by Linux")
SLOTS, CONTEXT, HEADS, SIZE, LAYERS = 16, 4095, 3, 64, 4

# How many bytes a process takes more after each of: ten tokens in every slot, copies and exchanges, a slot set to zero.
GROWTH = f"""
import resource
import torch
from steering_vectors.runtime.slot_cache import AttentionMetadata, SlotCache

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def write(cache, first, count):
    rows, columns = torch.arange({SLOTS}).unsqueeze(1), torch.arange(first, first + count).repeat({SLOTS}, 1)
    states = torch.ones({SLOTS}, {HEADS}, count, {SIZE})
    with cache.forward_pass(AttentionMetadata(slice(0, {SLOTS}), rows, columns, columns, first + count)):
        for layer in cache.layers:
            layer.update(states, states)

write(SlotCache(layers=1, slots={SLOTS}, context=63), 0, 10)
cache = SlotCache(layers={LAYERS}, slots={SLOTS}, context={CONTEXT})
before = resident()
write(cache, 0, 10)
print(resident() - before)
for slot in range(0, {SLOTS}, 2):
    cache.copy(slot, slot + 1, 10)
    cache.swap(slot, slot + 1, 10)
print(resident() - before)
write(cache, 0, 2000)
full = resident()
cache.zero(3)
print(full - resident())
"""


@only_linux
def test_memory_follows_the_tokens_held() -> None:
    ran = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    written, moved, returned = map(int, ran.stdout.split())
    page, strips = mmap.PAGESIZE, LAYERS * 2 * SLOTS * HEADS
    assert 4 * 10 * SIZE * strips <= written < 2 * page * strips + 2**22  # of 400 MB that all positions would take
    assert moved < written + 2**22
    assert returned > 0.9 * 4 * 2000 * SIZE * strips / SLOTS


def test_zeros_are_like_torch() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        made = zeros((3, 5, 7), torch.ones(1, dtype=dtype))
        assert torch.equal(made, torch.zeros(3, 5, 7, dtype=dtype))
        assert made.is_contiguous()
        assert made.dtype == dtype
    assert zeros((2, 0), torch.ones(1)).shape == (2, 0)


@pytest.mark.parametrize(("first", "last"), [(0, 9000), (1, 2), (17, 1030), (1024, 4096), (700, 8999), (5, 5)])
def test_a_part_is_cleared_and_nothing_else(first: int, last: int) -> None:
    made = zeros((9000,), torch.ones(1)).normal_(generator=torch.Generator().manual_seed(0))
    expected = made.clone()
    expected[first:last] = 0
    clear(made[first:last])
    assert torch.equal(made, expected)


def filled() -> SlotCache:
    cache = SlotCache(layers=2, slots=4, context=20)
    generator = torch.Generator().manual_seed(1)
    columns = torch.arange(21).repeat(4, 1)
    with cache.forward_pass(AttentionMetadata(slice(0, 4), torch.arange(4).unsqueeze(1), columns, columns, 21)):
        for layer in cache.layers:
            layer.update(*(torch.randn(4, 3, 21, 8, generator=generator) for _ in range(2)))
    return cache


def states(cache: SlotCache) -> list[torch.Tensor]:
    return [one.clone() for layer in cache.layers for one in (layer.keys, layer.values)]


def copied(one: torch.Tensor) -> None:
    one[3, :, :7] = one[1, :, :7].clone()


def swapped(one: torch.Tensor) -> None:
    one[[1, 3], :, :7] = one[[3, 1], :, :7].clone()


def zeroed(one: torch.Tensor) -> None:
    one[1] = 0


CHANGES: list[tuple[Callable[[SlotCache], Any], Callable[[torch.Tensor], None]]] = [
    (lambda cache: cache.copy(1, 3, 7), copied),
    (lambda cache: cache.swap(1, 3, 7), swapped),
    (lambda cache: cache.zero(1), zeroed),
]


@pytest.mark.parametrize(("change", "reference"), CHANGES, ids=["copy", "swap", "zero"])
def test_slots_change_and_nothing_else(
    change: Callable[[SlotCache], Any], reference: Callable[[torch.Tensor], None]
) -> None:
    cache = filled()
    expected = states(cache)
    for one in expected:
        reference(one)
    change(cache)
    assert all(torch.equal(*pair) for pair in zip(states(cache), expected, strict=True))
