"""Likelihoods of signals against simulated people, whose likelihoods are known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import logit

from benchmarks.learning.crowd import DONE, DWELL, DWELL_SPREAD, Crowd, shared_out, signal, stored
from server.feedback.items import Answer
from server.learning.behaviour.likelihoods import PRIOR, Likelihoods, fit_likelihoods, judgements_of
from server.learning.behaviour.signals import behaviours_of
from tests.server.learning.behaviour.worlds import world


def fitted(count: int, judged: float, seed: int = 0, noise: float = 0.0) -> Likelihoods:
    crowd = Crowd(seed, noise)
    given = [
        one for user, pairs in shared_out(world(seed, count), 20).items() for one in crowd.signals(user, pairs, judged)
    ]
    return fit_likelihoods(judgements_of(given, behaviours_of(given), {}))


def test_many_judgements_give_the_true_log_odds() -> None:
    found = fitted(3000, 1.0)
    truth = [float(logit(good) - logit(bad)) for good, bad in DONE.values()]
    truth.append((DWELL[0] - DWELL[1]) / DWELL_SPREAD**2)
    assert found.judgements == 3000
    deviations = (np.array(found.log_odds) - truth) / found.errors
    assert np.abs(deviations).max() < 3.5
    assert max(found.errors) < 0.25


def test_without_judgements_the_prior_holds() -> None:
    found = fitted(20, 0.0)
    assert found.log_odds == pytest.approx(PRIOR, abs=0.03)
    assert (found.judgements, found.calibration) == (0, None)


def test_few_judgements_move_the_prior_a_little() -> None:
    few, many = fitted(4, 1.0), fitted(400, 1.0)
    assert few.calibration is None
    assert abs(few.log_odds[0] - PRIOR[0]) < 0.6
    assert max(many.errors) < min(few.errors)


def test_calibration_is_that_of_unseen_prompts() -> None:
    found = fitted(600, 1.0).calibration
    assert found is not None
    assert found["judgements"] == 600
    assert found["brier"] < 0.1
    assert found["expected_error"] < 0.05
    nothing = fitted_on_noise()
    assert nothing is not None
    assert nothing["brier"] == pytest.approx(0.25, abs=0.03)
    assert nothing["expected_error"] < 0.1


def fitted_on_noise() -> object:
    """People whose judgements have nothing to do with what they do."""
    crowd = Crowd(1, noise=0.5)
    pairs = shared_out(world(1, 600), 20)
    given = [one for user, own in pairs.items() for one in [*crowd.signals(user, own), *crowd.votes(user, own)]]
    return fit_likelihoods(judgements_of(given, behaviours_of(given), {})).calibration


def test_thumbs_and_ratings_judge_single_answers() -> None:
    good: Answer = {"prompt": "p", "text": "good"}
    bad: Answer = {"prompt": "p", "text": "bad"}
    given = [
        signal("u", good, "copied"),
        signal("v", bad, "copied"),
        stored("thumb", {"thumb": "up"}, "u", (good,)),
        stored("rating", {"rating": 1, "min": 1, "max": 5}, "v", (bad,)),
        stored("rating", {"rating": 3, "min": 1, "max": 5}, "v", (bad,)),
        stored("comment", {"comment": "hm"}, "v", (bad,)),
        stored("pair", {"better": "tie"}, "v", (good, bad)),
        stored("thumb", {"thumb": "up"}, "u", ({"prompt": "p", "text": "nothing was done with it"},)),
    ]
    found = judgements_of(given, behaviours_of(given), {"v": 0.5})
    assert found.rows.tolist() == [[1, 0, 0, 0, 0, 1]] * 2
    assert found.good.tolist() == [True, False]
    assert found.weights.tolist() == [1.0, 0.5]
