"""The paired bootstrap over prompts of a difference between two versions."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

import numpy as np
from scipy.stats import norm, t

DRAWS = 10_000
ROUNDING = 1e-6  # a smaller difference between two versions is one of float32, and counts as none


class Options(TypedDict, total=False):
    """`weights` says how much each row counts within its prompt."""

    weights: Sequence[float]
    confidence: float
    draws: int
    seed: int


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean difference per prompt, with its interval. `prompts` are those that it is over."""

    value: float
    low: float
    high: float
    prompts: int


def paired_difference(
    candidate: np.ndarray, baseline: np.ndarray, prompts: Sequence[Hashable], **options: Unpack[Options]
) -> Difference:
    """`paired_mean` of candidate − baseline, float64 `[rows]` each, where both are about the same rows."""
    return paired_mean(np.asarray(candidate, float) - np.asarray(baseline, float), prompts, **options)


def paired_mean(values: np.ndarray, prompts: Sequence[Hashable], **options: Unpack[Options]) -> Difference:
    """The mean over prompts of differences of two versions, float64 `[rows]`; `prompts[i]` is the prompt of row i.

    Rows of one prompt are averaged, by their weights if there are any, and prompts are resampled, because rows of one
    prompt are alike. The interval is the expanded percentile interval: its percentiles are those at which the interval
    of normal data has the width of Student's (Hesterberg, "What Teachers Should Know about the Bootstrap", The American
    Statistician 69, 2015, arXiv:1411.5279, §4.2), because percentiles alone are too narrow for few prompts. With one
    prompt the interval is infinite.
    """
    means = _prompt_means(np.asarray(values, float), prompts, options.get("weights"))
    count = len(means)
    if count < 2:
        value = float(means[0]) if count else 0.0
        return Difference(value, -math.inf, math.inf, count)
    draw = np.random.default_rng(options.get("seed", 0))
    drawn = np.array([means[draw.integers(0, count, count)].mean() for _ in range(options.get("draws", DRAWS))])
    low, high = np.quantile(drawn, expanded_percentiles(count, options.get("confidence", 0.95)))
    return Difference(float(means.mean()), float(low), float(high), count)


def expanded_percentiles(count: int, confidence: float = 0.95) -> tuple[float, float]:
    """The quantiles of the bootstrap distribution of a mean of `count` numbers that are an interval's ends:
    Φ(±√(n ÷ (n − 1)) · t), with t of n − 1 degrees of freedom."""
    quantile = float(t.ppf(0.5 + confidence / 2, count - 1))
    tail = float(norm.cdf(-math.sqrt(count / (count - 1)) * quantile))
    return tail, 1 - tail


def _prompt_means(differences: np.ndarray, prompts: Sequence[Hashable], weights: Sequence[float] | None) -> np.ndarray:
    """One weighted mean for each prompt, in the order of their first rows."""
    places: dict[Hashable, int] = {}
    owners = np.array([places.setdefault(prompt, len(places)) for prompt in prompts], dtype=int)
    counted = np.ones(len(differences)) if weights is None else np.asarray(weights, float)
    totals = np.bincount(owners, counted, minlength=len(places))
    sums = np.bincount(owners, counted * differences, minlength=len(places))
    means: np.ndarray = sums / totals
    return np.where(np.abs(means) < ROUNDING, 0.0, means)
