"""How far the residual stream points along a profile's directions."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from steering_vectors.profiles.profile import Profile


def projection(profile: Profile, residuals: Mapping[int, torch.Tensor]) -> float:
    """Mean over the profile's blocks of (h·d) / (c·‖d‖²), h float32 `[hidden]` being the block's output as steered.

    In units of strength: at a block of its own, strength α adds α to it. For a profile that ablates it is (h·d)/‖d‖².
    """
    unit = 1.0 if profile.operator == "ablate" else profile.unit
    values = []
    for layer, direction in profile.directions.items():
        h, d = residuals[layer].cpu().double(), direction.double()
        values.append(float(h @ d) / (unit * max(float(d @ d), 1e-12)))
    return sum(values) / len(values)
