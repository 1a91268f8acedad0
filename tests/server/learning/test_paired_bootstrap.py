"""The paired bootstrap: against other computations of the same, and its coverage with few prompts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import bootstrap, norm

from server.learning.paired_bootstrap import Difference, expanded_percentiles, paired_difference, paired_mean


def test_many_prompts_have_the_percentile_interval_of_scipy() -> None:
    draw = np.random.default_rng(0)
    new, old = draw.normal(0.2, 1, 400), draw.normal(0, 1, 400)
    found = paired_difference(new, old, range(400))
    reference = bootstrap((new - old,), np.mean, method="percentile", rng=np.random.default_rng(1)).confidence_interval
    assert found.value == pytest.approx(np.mean(new - old))
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=0.012)
    assert found.prompts == 400


def test_rows_of_a_prompt_are_one_by_their_weights() -> None:
    found = paired_difference(
        np.array([3.0, 1.0, 5.0]), np.array([1.0, 1.0, 1.0]), ["a", "a", "b"], weights=[3.0, 1.0, 1.0]
    )
    assert found.value == pytest.approx(((3 * 2 + 0) / 4 + 4) / 2)
    assert found.prompts == 2
    again = paired_difference(np.array([1.5, 4.0]), np.zeros(2), ["a", "b"])
    assert (found.low, found.high) == (again.low, again.high)


def test_differences_of_rounding_are_none() -> None:
    assert paired_mean(np.full(20, 7e-9), list(range(20))) == Difference(0.0, 0.0, 0.0, 20)


def test_one_prompt_says_nothing() -> None:
    found = paired_difference(np.array([3.0, 4.0]), np.zeros(2), ["a", "a"])
    assert (found.value, found.low, found.high, found.prompts) == (3.5, -math.inf, math.inf, 1)
    assert paired_difference(np.zeros(0), np.zeros(0), []).low == -math.inf


def test_the_percentiles_are_wider_for_few_prompts() -> None:
    """Of normal data, Φ⁻¹ of the tail times the bootstrap's standard error is Student's interval."""
    low, high = expanded_percentiles(10)
    assert low == pytest.approx(1 - high)
    assert -norm.ppf(low) * math.sqrt(9 / 10) == pytest.approx(2.262, abs=1e-3)  # t of 9 degrees of freedom
    assert expanded_percentiles(10**6)[0] == pytest.approx(0.025, abs=1e-5)


@pytest.mark.parametrize("prompts", [8, 15])
def test_noise_is_rarely_taken_for_a_gain(prompts: int) -> None:
    """Without a difference, the interval lies above 0 in at most one of twenty cases, also with few prompts."""
    draw = np.random.default_rng(5)
    above = [
        paired_difference(draw.standard_t(5, prompts), np.zeros(prompts), range(prompts), draws=600, seed=case).low > 0
        for case in range(1500)
    ]
    assert np.mean(above) < 0.05
