"""How far two next-token distributions are apart."""

from __future__ import annotations

import torch


def kl_divergence(steered: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """KL(steered‖base) in nats, from log-probabilities `[..., vocabulary]`; tokens barred under both cost nothing."""
    gains = (steered - base).masked_fill(steered == -torch.inf, 0)
    return (steered.exp() * gains).sum(-1)
