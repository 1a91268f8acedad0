"""Random directions as controls, bootstrap statistics, and the header of every measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from steering_vectors.measures.results import MeasuredProfile
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.profile import Profile


def measured_profile(lm: LanguageModel, profile: Profile) -> MeasuredProfile:
    return {
        "profile": profile.name,
        "version": profile.version,
        "method": profile.method,
        "layers": list(profile.layers),
        "model": lm.identity.id,
    }


def random_controls(profile: Profile, count: int, *, seed: int = 0) -> list[Profile]:
    """Profiles of random directions, whose shifts have the norm of the profile's shift at every block."""
    return [_random_control(profile, index, seed) for index in range(count)]


def _random_control(profile: Profile, index: int, seed: int) -> Profile:
    generator = torch.Generator().manual_seed(1000 * seed + index)
    directions = {}
    for layer, shift in profile.injected().items():
        noise = torch.randn(shift.shape, generator=generator)
        directions[layer] = noise * (shift.norm() / noise.norm())
    return replace(
        profile,
        name=f"random-{index}",
        directions=directions,
        method="random",
        method_options={"seed": 1000 * seed + index, "norms_of": profile.name},
        layering="independent",
        calibration={},
        metrics={},
        version="",
    )


def bootstrap(
    statistic: Callable[[np.ndarray], float], rows: int, *, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of `statistic(indices)` over resampled row indices."""
    return interval(resample(statistic, rows, draws=draws, seed=seed))


def resample(statistic: Callable[[np.ndarray], float], rows: int, *, draws: int = 2000, seed: int = 0) -> np.ndarray:
    """`statistic(indices)` of resampled row indices: `[draws]`. Equal seeds draw equal indices, so the draws of two
    statistics are paired."""
    drawn = np.random.default_rng(seed).integers(0, rows, (draws, rows))
    return np.array([statistic(indices) for indices in drawn])


def interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def span(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)
