"""The gates of a candidate: each bound, and what is said of one that did not hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from server.learning.comparison import Compared, TrustChange, harm, without_drift
from server.learning.paired_bootstrap import Difference
from server.learning.promotion import Bounds, failed, gates_of
from steering_vectors.errors import FitError
from steering_vectors.evaluation.trust.figures import Figure
from steering_vectors.measures.curve import CurvePoint
from steering_vectors.profiles.profile import ModelIdentity, Profile

MODEL = ModelIdentity("tiny", "Tiny", 4, 2, "f" * 64)
BASELINE = Profile("warm", MODEL, {1: torch.ones(4)}, "mean-diff", max_strength=1.4, calibration={"kl_budget": 0.1})
GOOD = Compared(
    Difference(0.2, 0.05, 0.35, 20),
    Difference(2.0, 0.5, 3.5, 20),
    None,
    CurvePoint(1.0, 0.11, 5.0),
    CurvePoint(1.0, 0.1, 4.8),
    {},
)


def reasons(compared: Compared, candidate: Profile = BASELINE, **bounds: Any) -> list[str]:
    return failed(gates_of(compared, candidate, BASELINE, Bounds(**bounds), 1.0))


def trust(change: float) -> dict[str, TrustChange]:
    return {"bias": {"measure": "m", "baseline": 0.5, "candidate": 0.5, "change_95": (0.0, 0.0), "harm": change}}


def test_a_candidate_within_all_bounds_passes() -> None:
    assert reasons(replace(GOOD, trust=trust(0.05))) == []


@pytest.mark.parametrize(
    ("compared", "expected"),
    [
        (
            replace(GOOD, votes=Difference(0.2, 0.0, 0.4, 20)),
            "the low end of the gain on held-out votes is 0, not above 0",
        ),
        (replace(GOOD, candidate=CurvePoint(1.0, 0.13, 5.0)), "KL per token is 0.13, not at most 0.125"),
        (replace(GOOD, candidate=CurvePoint(1.0, 0.1, 6.1)), "perplexity is 6.1, not at most 6"),
        (replace(GOOD, trust=trust(0.06)), "harm to bias is 0.06, not at most 0.05"),
    ],
)
def test_each_bound_holds_on_its_own(compared: Compared, expected: str) -> None:
    assert reasons(compared) == [expected]


def test_a_served_version_below_its_budget_is_no_stricter_bound() -> None:
    """Both are calibrated to the same KL, and the measured one varies with the prompts."""
    assert reasons(replace(GOOD, baseline=CurvePoint(1.0, 0.04, 4.8))) == []


@pytest.mark.parametrize(("limit", "expected"), [(1.0, []), (0.9, ["safe strength is 0.9, not at least 1"])])
def test_the_safe_range_must_hold_the_strength(limit: float, expected: list[str]) -> None:
    assert reasons(GOOD, replace(BASELINE, max_strength=limit)) == expected
    narrow = replace(BASELINE, max_strength=limit)
    assert failed(gates_of(GOOD, narrow, narrow, Bounds(), 1.0)) == []  # it was as narrow before


@pytest.mark.parametrize(
    ("aim", "old", "new", "expected"),
    [("lower", 0.1, 0.3, 0.2), ("higher", 0.1, 0.3, -0.2), ("half", 0.55, 0.4, 0.05), ("half", 0.3, 0.6, -0.1)],
)
def test_harm_is_a_change_for_the_worse(aim: Any, old: float, new: float, expected: float) -> None:
    assert harm(Figure("f", "a figure", "column", aim), old, new) == pytest.approx(expected)


@pytest.mark.parametrize(
    "values",
    [
        {"confidence": 0.3},
        {"confidence": 1.0},
        {"min_prompts": 1},
        {"max_kl_ratio": 0},
        {"max_trust_harm": float("nan")},
    ],
)
def test_bounds_that_cannot_be_used(values: dict[str, Any]) -> None:
    with pytest.raises(FitError):
        Bounds(**values)


def test_who_likes_short_answers_is_not_pleased_by_every_change() -> None:
    """Answers that lose 0.1 nats per token, whatever they say, differ by their lengths alone: nothing is left of it."""
    draw = np.random.default_rng(0)
    short, long = draw.integers(5, 20, 400), draw.integers(30, 60, 400)
    losses = [-0.1 * tokens + draw.normal(0, 0.3 * np.sqrt(tokens)) for tokens in (short, long)]
    assert (losses[0] - losses[1]).mean() > 3
    assert abs(without_drift(*losses, short, long).mean()) < 0.3
    liked = without_drift(losses[0] + 2.0, losses[1], short, long)
    assert liked.mean() > 1
    assert np.allclose(without_drift(np.array([3.0]), np.array([1.0]), np.array([5]), np.array([5])), 2.0)
