"""A gate: whether a profile steers at all, decided by a prompt.

Owns the condition and its measure. Knows nothing of how a gate is found, stored or carried out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

from steering_vectors.errors import ProfileError
from steering_vectors.profiles.metadata import GateMetrics

Side = Literal["above", "below"]
SIDES = ("above", "below")


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """Open for prompts whose similarity to `direction` float32 `[hidden]` at block `layer` lies on `side` of
    `threshold`.

        s = cos(h̄, tanh(P h̄)),   P the projection on the direction,

    h̄ being the mean of the block's output over the prompt, but for its last token, from which on generated text is
    steered. Paper: conditional activation steering (CAST, arXiv:2409.05907).
    """

    layer: int
    direction: torch.Tensor
    threshold: float
    side: Side
    metrics: GateMetrics = field(default_factory=GateMetrics)

    def __post_init__(self) -> None:
        if self.side not in SIDES:
            raise ProfileError(f"the gate's side is {self.side!r}, not one of {', '.join(SIDES)}")
        if not math.isfinite(self.threshold):
            raise ProfileError("the gate's threshold is not a finite number")
        if self.direction.dtype != torch.float32 or self.direction.dim() != 1:
            raise ProfileError("the gate's direction is not a float32 vector")
        if not bool(self.direction.isfinite().all()) or not bool(self.direction.any()):
            raise ProfileError("the gate's direction is zero, or has a NaN or infinite entry")

    def similarity(self, mean: torch.Tensor) -> float:
        """s of one prompt, from its mean block output `[hidden]`; in −1 to 1."""
        return float(similarities(mean.float().unsqueeze(0), self.direction.to(mean.device))[0])

    def opens(self, similarity: float) -> bool:
        return similarity >= self.threshold if self.side == "above" else similarity <= self.threshold


def similarities(means: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """cos(h̄, tanh(P h̄)) of rows of means `[rows, hidden]`: `[rows]`; 0 where there is nothing to compare."""
    unit = direction / direction.norm()
    projected = (means @ unit).unsqueeze(-1) * unit
    return torch.cosine_similarity(means, projected.tanh(), dim=-1)
