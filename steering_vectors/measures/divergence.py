"""The divergence of two next-token distributions."""

from __future__ import annotations

import torch


def kl_divergence(steered: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """KL(steered‖base) in nats, from log-probabilities `[..., vocabulary]`. Tokens with probability 0 add nothing."""
    gains = (steered - base).masked_fill(steered == -torch.inf, 0)
    return (steered.exp() * gains).sum(-1)
