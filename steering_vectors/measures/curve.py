"""The curve of cost and fluency over strength, and the safe range read from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from steering_vectors.measures.steered_model import SteeredModel
from steering_vectors.profiles.metadata import CurvePointRecord
from steering_vectors.profiles.profile import Profile
from steering_vectors.progress import Progress

STRENGTHS = (1.0, 2.0, 3.0)
HALF_STEP = 0.5
PERPLEXITY_BOUND = 3.0  # factor over the perplexity of unsteered texts
TEXTS = 24


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Texts sampled at one strength: their KL(steered‖base) in nats per token, and their perplexity under the
    unsteered model."""

    strength: float
    kl: float
    perplexity: float


def measure_curve(
    steered: SteeredModel,
    profile: Profile,
    prompts: Sequence[Sequence[int]],
    *,
    bound: float = PERPLEXITY_BOUND,
    tokens: int,
    seed: int,
    progress: Progress | None = None,
) -> list[CurvePoint]:
    """Measure points at strength 0, ±1, ±2 and ±3, up to the first magnitude at which the perplexity of either sign
    exceeds `bound` times that at 0, and half a step before it. The points ascend."""

    def measure(*strengths: float) -> list[CurvePoint]:
        return measure_points(steered, profile, strengths, prompts, tokens=tokens, seed=seed)

    points: list[CurvePoint] = []
    for number, strength in enumerate(STRENGTHS, start=1):
        both = measure(*([] if points else [0.0]), -strength, strength)
        points += both
        if progress is not None:
            progress("curve", number, len(STRENGTHS))
        if max(point.perplexity for point in both) > bound * points[0].perplexity:
            points += measure(HALF_STEP - strength, strength - HALF_STEP)
            break
    if progress is not None:
        progress("curve", len(STRENGTHS), len(STRENGTHS))
    return sorted(points, key=lambda point: point.strength)


def measure_points(
    steered: SteeredModel,
    profile: Profile,
    strengths: Sequence[float],
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int,
    seed: int,
) -> list[CurvePoint]:
    """Sample texts after the prompts at each strength, and measure their KL and their unsteered perplexity."""
    points = []
    sampled = steered.sample_and_compare(profile, strengths, prompts, tokens=tokens, seed=seed)
    for strength, found in zip(strengths, sampled, strict=True):
        count = max(found.tokens, 1)
        loss = -float(found.likelihoods.sum()) / count
        points.append(CurvePoint(strength, float(found.divergences.sum()) / count, math.exp(min(loss, 700.0))))
    return points


def safe_strength(points: Sequence[CurvePoint], bound: float = PERPLEXITY_BOUND) -> float:
    """The largest strength, of both signs, at which perplexity stays within `bound` times that at 0.

    Log-perplexity is interpolated linearly between the last point within the bound and the first one beyond it. The
    result is rounded down to a tenth.
    """
    at = {point.strength: math.log(point.perplexity) for point in points}
    limit, safe, below = at[0.0] + math.log(bound), 0.0, at[0.0]
    for strength in sorted(strength for strength in at if strength > 0):
        worst = max(at[strength], at[-strength])
        if worst > limit:
            safe += (strength - safe) * (limit - below) / (worst - below)
            break
        safe, below = strength, worst
    return math.floor(10 * safe + 1e-9) / 10


def curve_record(points: Sequence[CurvePoint]) -> list[CurvePointRecord]:
    return [CurvePointRecord(strength=one.strength, kl=one.kl, perplexity=one.perplexity) for one in points]
