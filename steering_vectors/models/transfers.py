"""Copying small tensors to the model's device without waiting for it.

A copy from pageable memory to a GPU waits for all work queued before it. A copy from pinned memory does not, and
torch's pinned allocator reuses a block only after its copies are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def sent(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A CPU tensor on the model's device; the tensor itself if that is the CPU."""
    ready = staged(tensor, device)
    return ready.to(device, non_blocking=ready is not tensor)


def staged(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A CPU tensor in pinned memory, for a copy that does not block; the tensor itself if the device is not CUDA."""
    return tensor.pin_memory() if torch.device(device).type == "cuda" else tensor


def tensor_on(values: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> torch.Tensor:
    return sent(torch.tensor(values, dtype=dtype), device)


def picked(tensor: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    """A copy of the tensor's rows at these places."""
    return tensor[tensor_on(list(places), tensor.device)]
