"""A gate: a condition on the prompt that decides whether a profile steers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from steering_vectors.errors import ProfileError
from steering_vectors.profiles.metadata import GateMetrics

Side = Literal["above", "below"]
SIDES: tuple[Side, ...] = get_args(Side)


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """Opens for prompts whose similarity s to `direction`, float32 `[hidden]`, is on `side` of `threshold`.

        s = cos(h̄, tanh(P h̄)),   P the projection on the direction

    h̄ is the mean output of block `layer` over the prompt without its last token, where steering begins. Paper:
    conditional activation steering (CAST, arXiv:2409.05907).
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
            raise ProfileError("the gate's direction is zero or has a NaN or infinite entry")

    def similarity(self, mean: torch.Tensor) -> float:
        """s of one prompt, from −1 to 1, given its mean block output `[hidden]`."""
        return float(similarities(mean.float().unsqueeze(0), self.direction.to(mean.device))[0])

    def opens(self, similarity: float) -> bool:
        return similarity >= self.threshold if self.side == "above" else similarity <= self.threshold


def similarities(means: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """cos(h̄, tanh(P h̄)) for means `[rows, hidden]`: `[rows]`. It is 0 if a mean or its projection is zero."""
    unit = direction / direction.norm()
    projected = (means @ unit).unsqueeze(-1) * unit
    return torch.cosine_similarity(means, projected.tanh(), dim=-1)
