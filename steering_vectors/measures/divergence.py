"""The divergence of two next-token distributions."""

from __future__ import annotations

import torch


def kl_divergence(steered: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """KL(steered‖base) in nats, from log-probabilities `[..., vocabulary]`. Tokens with probability 0 add nothing."""
    gains = (steered - base).masked_fill_(steered == -torch.inf, 0)
    divergence: torch.Tensor = torch.linalg.vecdot(steered.exp(), gains)
    return divergence
