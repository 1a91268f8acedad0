"""Bringing small tensors to the model's device without making the host wait for it.

A copy from ordinary memory to a GPU waits until all that was asked of the GPU before is done. One from pinned memory
does not, and torch's allocator of pinned memory reuses a block only once its copies are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def sent(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A CPU tensor on the model's device; itself where that is the CPU."""
    ready = staged(tensor, device)
    return ready.to(device, non_blocking=ready is not tensor)


def staged(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A CPU tensor in pinned memory, for a copy that does not block; itself where the device is none of CUDA's."""
    return tensor.pin_memory() if torch.device(device).type == "cuda" else tensor


def tensor_on(values: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Numbers, as `torch.tensor` takes them, on the model's device."""
    return sent(torch.tensor(values, dtype=dtype), device)


def picked(tensor: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    """A copy of these of the tensor's rows."""
    return tensor[tensor_on(list(places), tensor.device)]
