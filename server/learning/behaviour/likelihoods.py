"""How much a signal says about an answer: log-odds, fitted on explicit judgements of the same answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from typing_extensions import TypedDict

from server.feedback.items import Stored
from server.learning.behaviour.signals import SIGNALS, Behaviour, Values, key_of
from server.learning.trial import is_good

# What is assumed before anything is measured, in the order of SIGNALS, and as how many judgements of each it counts.
PRIOR: Values = (1.5, -1.5, 0.7, -0.7, 0.3)
PRIOR_JUDGEMENTS = 8.0
RIDGE = 100.0  # the inverse of scikit-learn's penalty: the prior does the regularising
FOLDS, BINS, MIN_CALIBRATED = 5, 5, 20


class Calibration(TypedDict):
    """How well judgements of prompts that a fit did not see were foretold. `expected_error` is the expected calibration
    error in five bins (Naeini et al., AAAI 2015), `chance` the Brier score of a coin."""

    judgements: int
    brier: float
    chance: float
    log_loss: float
    expected_error: float


@dataclass(frozen=True, slots=True)
class Judgements:
    """Explicit judgements of answers with behaviours: float64 `[judgements, signals + 1]`. A pair's row is the
    difference of its answers' values, and a single answer's are its values with a 1 in the last column, which stands
    for how easily people are pleased. `good` is whether the first answer, or the only one, was found good."""

    rows: np.ndarray
    good: np.ndarray
    weights: np.ndarray
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Likelihoods:
    """By how much each signal changes the log-odds that an answer is the better one, with standard errors, both in the
    order of SIGNALS. `calibration` is None for fewer than 20 judgements."""

    log_odds: Values = PRIOR
    errors: Values = (float("inf"),) * len(SIGNALS)
    judgements: int = 0
    calibration: Calibration | None = None

    def score(self, values: Values) -> float:
        """The log-odds of a behaviour."""
        return float(np.dot(self.log_odds, values))


def judgements_of(
    stored: Iterable[Stored], behaviours: Sequence[Behaviour], weights: Mapping[str, float]
) -> Judgements:
    """Pairs, thumbs and ratings on answers that somebody's behaviour is known of. Of several people's behaviours with
    an answer their weighted mean counts. `weights` of users are 1 unless said."""
    seen = _means(behaviours, weights)
    none = np.zeros(len(SIGNALS))
    rows, good, counts, keys = [], [], [], []
    for one in stored:
        places = [(key_of(answer), answer["text"]) for answer in one.answers]
        key = places[0][0]
        if key is None or not any(place in seen for place in places):
            continue
        values = [seen.get(place, none) for place in places]
        if one.kind == "pair" and one.value["better"] != "tie":
            # an order that no vote depends on, so that both outcomes occur
            first = 0 if places[0][1] < places[1][1] else 1
            row, found = [*(values[first] - values[1 - first]), 0.0], "ab"[first] == one.value["better"]
        else:
            judged = is_good(one)
            if judged is None:
                continue
            row, found = [*values[0], 1.0], judged
        rows.append(row)
        good.append(found)
        counts.append(1.0 if one.user is None else weights.get(one.user, 1.0))
        keys.append(key)
    return Judgements(
        np.array(rows, dtype=np.float64).reshape(-1, len(SIGNALS) + 1),
        np.array(good, dtype=bool),
        np.array(counts, dtype=np.float64),
        tuple(keys),
    )


def fit_likelihoods(judgements: Judgements, prior_judgements: float = PRIOR_JUDGEMENTS) -> Likelihoods:
    """Logistic regression with a prior for each signal: as many judgements of that signal alone as `prior_judgements`,
    divided as PRIOR foretells. Where judgements are few, the prior decides. A pair is a Bradley-Terry comparison."""
    model = _fitted(judgements, np.ones(len(judgements.keys), dtype=bool), prior_judgements)
    rows, _, weights = _with_prior(judgements, prior_judgements)
    chance = expit(rows @ model)
    information = (rows * (weights * chance * (1 - chance))[:, None]).T @ rows + np.eye(rows.shape[1]) / RIDGE
    errors = np.sqrt(np.diag(np.linalg.inv(information)))
    return Likelihoods(
        tuple(model[:-1].tolist()),
        tuple(errors[:-1].tolist()),
        len(judgements.keys),
        _calibration(judgements, prior_judgements),
    )


def _means(behaviours: Sequence[Behaviour], weights: Mapping[str, float]) -> dict[tuple[str | None, str], np.ndarray]:
    sums: dict[tuple[str | None, str], tuple[np.ndarray, float]] = {}
    for one in behaviours:
        weight = 1.0 if one.user is None else weights.get(one.user, 1.0)
        values, total = sums.get(one.place, (np.zeros(len(SIGNALS)), 0.0))
        sums[one.place] = values + weight * np.array(one.values), total + weight
    return {place: values / total for place, (values, total) in sums.items() if total}


def _with_prior(judgements: Judgements, prior: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows, with two more of each signal and of the last column: one good, one bad."""
    alone = np.eye(len(SIGNALS) + 1)
    chance = expit(np.array([*PRIOR, 0.0]))
    return (
        np.concatenate([judgements.rows, alone, alone]),
        np.concatenate([judgements.good, np.ones(len(alone), dtype=bool), np.zeros(len(alone), dtype=bool)]),
        np.concatenate([judgements.weights, prior * chance, prior * (1 - chance)]),
    )


def _fitted(judgements: Judgements, part: np.ndarray, prior: float) -> np.ndarray:
    chosen = Judgements(judgements.rows[part], judgements.good[part], judgements.weights[part], ())
    rows, good, weights = _with_prior(chosen, prior)
    model = LogisticRegression(C=RIDGE, fit_intercept=False, max_iter=1000).fit(rows, good, sample_weight=weights)
    coefficients: np.ndarray = model.coef_[0]
    return coefficients


def _calibration(judgements: Judgements, prior: float) -> Calibration | None:
    """Over folds of prompts."""
    good, weights = judgements.good, judgements.weights
    if len(judgements.keys) < MIN_CALIBRATED or len(set(judgements.keys)) < FOLDS or not weights.sum():
        return None
    foretold = np.empty(len(good))
    for fitted, left in GroupKFold(FOLDS).split(judgements.rows, groups=judgements.keys):
        part = np.zeros(len(good), dtype=bool)
        part[fitted] = True
        foretold[left] = expit(judgements.rows[left] @ _fitted(judgements, part, prior))
    places = np.minimum((foretold * BINS).astype(int), BINS - 1)
    off = [abs(np.sum((weights * (foretold - good))[places == place])) for place in range(BINS)]
    sure = np.where(good, foretold, 1 - foretold).clip(1e-6)
    return {
        "judgements": len(good),
        "brier": float(np.average((foretold - good) ** 2, weights=weights)),
        "chance": 0.25,
        "log_loss": float(np.average(-np.log(sure), weights=weights)),
        "expected_error": float(sum(off) / weights.sum()),
    }
