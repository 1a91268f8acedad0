"""What a model's forward takes and returns: its arguments, the name of its state, its logits."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

STATE_ARGUMENTS = ("past_key_values", "cache_params", "state")
"""What architectures call their state of earlier positions."""


def takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


def state_argument(model: nn.Module) -> str | None:
    """The name of the model's state of earlier positions, or None if its forward takes no state."""
    return next((name for name in STATE_ARGUMENTS if takes(model, name)), None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, which has no dropout, until the context ends."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def last_logits(output: Any, count: int = 1) -> torch.Tensor:
    """Logits of the last positions `[count, vocabulary]` in what a model returned for one row."""
    logits: torch.Tensor = output.logits
    return logits[0, -count:]
