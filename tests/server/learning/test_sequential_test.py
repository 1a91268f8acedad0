"""The sequential test: its evidence against references, and its error rate when one looks after every outcome."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import betaln, xlog1py, xlogy

from server.learning.sequential_test import (
    Outcomes,
    Seen,
    always_valid_p,
    difference_interval,
    log_evidence,
    log_evidence_against_at_least,
    log_evidence_against_at_most,
    log_evidence_of_pairs,
)

ALPHA = 0.05


def test_one_outcome_by_hand() -> None:
    """One success of the candidate alone: B(3/2, 1/2) ÷ B(1/2, 1/2) = 1/2, and any rate up to 1 may have made it."""
    assert math.exp(log_evidence(Outcomes(1, 0), Outcomes())) == pytest.approx(0.5)
    assert always_valid_p(Outcomes(1, 0), Outcomes()) == 1.0
    assert difference_interval(Outcomes(), Outcomes()) == (-1.0, 1.0)


@pytest.mark.parametrize("difference", [-0.7, -0.2, 0.0, 0.05, 0.6])
def test_the_likelihood_is_the_largest_on_a_fine_grid(difference: float) -> None:
    new, old = Outcomes(31, 12), Outcomes(9, 23)
    rates = np.linspace(max(0, -difference), min(1, 1 - difference), 200_001)
    other = np.clip(rates + difference, 0, 1)
    likelihoods = xlogy(31, other) + xlog1py(12, -other) + xlogy(9, rates) + xlog1py(23, -rates)
    mixture = betaln(31.5, 12.5) + betaln(9.5, 23.5) - 2 * betaln(0.5, 0.5)
    assert log_evidence(new, old, difference) == pytest.approx(mixture - likelihoods.max(), abs=1e-6)


def test_the_interval_holds_what_the_evidence_admits() -> None:
    new, old = Outcomes(70, 30), Outcomes(45, 55)
    low, high = difference_interval(new, old, ALPHA)
    assert low < 0.25 < high
    for end in (low, high):
        assert log_evidence(new, old, end) == pytest.approx(math.log(1 / ALPHA), abs=1e-6)
    assert difference_interval(old, new, ALPHA) == pytest.approx((-high, -low), abs=1e-6)
    wide = difference_interval(new, old, 0.001)
    assert wide[0] < low
    assert high < wide[1]
    assert always_valid_p(new, old, low - 0.01) < ALPHA < always_valid_p(new, old, low + 0.01)


def test_all_good_and_all_bad_have_intervals_too() -> None:
    low, high = difference_interval(Outcomes(200, 0), Outcomes(0, 200))
    assert (0.9 < low < 1.0, high) == (True, 1.0)
    low, high = difference_interval(Outcomes(100, 0), Outcomes(100, 0))
    assert -0.1 < low < 0 < high < 0.1


@pytest.mark.parametrize(("rate", "share"), [(0.5, 0.5), (0.9, 0.5), (0.1, 0.1), (0.7, 0.2)])
def test_looking_after_every_outcome_is_rarely_wrong(rate: float, share: float) -> None:
    """Two equal rates, 1,500 streams of 1,200 outcomes, and a look after each: the truth is left out at any of them in
    at most 5 % of the streams (three standard deviations are 1.7 %)."""
    draw = np.random.default_rng(7)
    shape = (1500, 1200)
    is_new, good = draw.random(shape) < share, draw.random(shape) < rate
    new = (is_new & good).cumsum(1), (is_new & ~good).cumsum(1)
    old = (~is_new & good).cumsum(1), (~is_new & ~good).cumsum(1)
    mixture = sum(betaln(0.5 + s, 0.5 + f) for s, f in (new, old)) - 2 * betaln(0.5, 0.5)
    successes, failures = new[0] + old[0], new[1] + old[1]
    pooled = successes / (successes + failures)
    evidence = mixture - xlogy(successes, pooled) - xlog1py(failures, -pooled)
    for row, column in ((0, 0), (3, 17), (11, 1199)):  # the closed form is that of the library
        counts = (
            Outcomes(int(new[0][row, column]), int(new[1][row, column])),
            Outcomes(int(old[0][row, column]), int(old[1][row, column])),
        )
        assert evidence[row, column] == pytest.approx(log_evidence(*counts), abs=1e-6)
    wrong = (evidence.max(1) >= math.log(1 / ALPHA)).mean()
    assert wrong <= ALPHA
    fixed = 1.96 * np.sqrt(
        pooled * (1 - pooled) * (1 / np.maximum(new[0] + new[1], 1) + 1 / np.maximum(old[0] + old[1], 1))
    )
    naive = np.abs(new[0] / np.maximum(new[0] + new[1], 1) - old[0] / np.maximum(old[0] + old[1], 1)) > fixed
    assert (
        naive[:, 100:].any(1).mean() > 4 * ALPHA
    )  # what a test for one look does when it is looked at again and again


def test_a_worse_candidate_is_found_and_found_soon() -> None:
    """0.4 against 0.6, half of the requests each: most streams have a verdict within 600 outcomes."""
    draw = np.random.default_rng(3)
    needed = []
    for _ in range(40):
        counts = [[0, 0], [0, 0]]
        for seen in range(1, 1501):
            side = int(draw.random() < 0.5)
            counts[side][int(draw.random() >= (0.4 if side else 0.6))] += 1
            sides = Seen(Outcomes(*counts[1]), Outcomes(*counts[0]))
            if log_evidence_against_at_least(sides, 0.0) >= math.log(1 / ALPHA):
                needed.append(seen)
                break
    assert len(needed) == 40
    assert np.median(needed) <= 600


def test_one_sided_evidence_agrees_with_the_interval() -> None:
    seen = Seen(Outcomes(45, 55), Outcomes(70, 30))
    low, high = difference_interval(seen.candidate, seen.baseline, ALPHA)
    enough = math.log(1 / ALPHA)
    assert log_evidence_against_at_least(seen, high + 0.01) > enough > log_evidence_against_at_least(seen, high - 0.01)
    assert log_evidence_against_at_most(seen, low - 0.01) > enough > log_evidence_against_at_most(seen, low + 0.01)
    assert log_evidence_against_at_least(seen, -0.5) == pytest.approx(
        log_evidence(seen.candidate, seen.baseline, -0.25)
    )


def test_pairs_add_their_evidence() -> None:
    """Eight lost pairs: B(1/2, 17/2) ÷ B(1/2, 1/2) · 2⁸ against winning half of them, or more."""
    lost = Outcomes(0, 8)
    expected = betaln(0.5, 8.5) - betaln(0.5, 0.5) + 8 * math.log(2)
    assert log_evidence_of_pairs(lost) == pytest.approx(expected)
    assert log_evidence_against_at_least(Seen(pairs=lost), 0.0) == pytest.approx(expected)
    rates = Outcomes(10, 20), Outcomes(20, 10)
    both = log_evidence_against_at_least(Seen(*rates, lost), 0.0)
    assert both == pytest.approx(expected + log_evidence_against_at_least(Seen(*rates), 0.0))
    assert log_evidence_against_at_most(Seen(pairs=Outcomes(8, 0)), 0.0) == pytest.approx(expected)


def test_verdicts_on_equal_versions_are_rarely_wrong_with_pairs_too() -> None:
    """Thumbs and pairs in turn, and a look after each: an equal version is called worse in at most 5 % of streams."""
    draw = np.random.default_rng(11)
    wrong = 0
    for _ in range(150):
        counts = np.zeros((3, 2), int)
        for _ in range(150):
            counts[draw.integers(0, 3), draw.integers(0, 2)] += 1
            seen = Seen(*(Outcomes(int(good), int(bad)) for good, bad in counts))
            if log_evidence_against_at_least(seen, 0.0) >= math.log(1 / ALPHA):
                wrong += 1
                break
    assert wrong <= 0.05 * 150
