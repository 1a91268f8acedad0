"""Steering by plain torch hooks, as a reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from steering_vectors.models.loading import LanguageModel


@contextmanager
def shifted(lm: LanguageModel, shifts: Mapping[int, torch.Tensor], start: int) -> Iterator[None]:
    """Add `shifts[l]` to block l's output at the positions from `start` on, in every pass run inside."""

    def hook_for(layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> Any:
            hidden = (output if isinstance(output, torch.Tensor) else output[0]).clone()
            hidden[:, start:] += shifts[layer]
            return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

        return hook

    handles = [lm.blocks[layer].register_forward_hook(hook_for(layer)) for layer in shifts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
