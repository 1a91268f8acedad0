"""How far each user's votes can be trusted, and how much one user may count."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse
from scipy.special import expit, logit
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from server.learning.votes import Vote

PRIOR = (4.0, 1.0)  # of the beta distribution of accuracies: four votes with the others, one against them
TRUSTED = 0.8  # its mean, the accuracy of a user of whom nothing is known, who counts 1
TURNS, FOLDS, MIN_USERS = 3, 5, 3
WORDS = 4096  # the most frequent ones
RIDGE = 0.03  # strong: close to a difference of means, which noisy votes move little
MAX_USER_SHARE = 0.1
GRID = np.linspace(0.005, 0.995, 199)


@dataclass(frozen=True, slots=True)
class Items:
    """Votes as numbers. `rows` are float64 `[votes, features]`: the words (tf-idf) and the logarithm of the number of
    words of the chosen answer less those of the rejected one. `sides` ±1 is which of both comes first in an order of
    texts that no vote depends on. `same` has for each vote a number that stands for its two texts."""

    rows: sparse.csr_matrix
    sides: np.ndarray
    same: np.ndarray
    users: np.ndarray
    confidence: np.ndarray


def reliabilities(votes: Sequence[Vote], known: Mapping[str, float] | None = None) -> dict[str, float]:
    """The weight of each user, from 0 (votes as if at random, or against the others) to 1.

    The one-coin model of Dawid and Skene (Applied Statistics 28, 1979) with a beta prior of accuracies, and with a
    classifier of the answers that foretells what others would say, as in Raykar et al. (JMLR 11, 2010); so users are
    compared who have not seen the same answers. Here the classifier, ridge logistic regression on texts, sees no vote
    of the users whom it judges, so nobody agrees with himself. A user's accuracy is its mean under its posterior, and
    the weight is 2 · accuracy − 1, with 1 for the prior's mean and at most 1. Classifier and weights are fitted in
    three turns. `known` are weights from elsewhere, which the classifier uses as well.

    With fewer than three users nobody can be outvoted, and everyone counts 1.
    """
    named = [vote for vote in votes if vote.user is not None]
    users = sorted({str(vote.user) for vote in named})
    weights = dict.fromkeys(users, 1.0)
    if len(users) < MIN_USERS:
        return weights
    items = _items(named)
    for _ in range(TURNS):
        counted = np.array([weights[user] * (known or {}).get(user, 1.0) for user in items.users])
        expected = _expected(items, counted)
        for user in users:
            own = items.users == user
            weights[user] = _weight(expected[own], items.confidence[own])
    return weights


def capped(votes: Sequence[Vote], max_share: float = MAX_USER_SHARE) -> list[Vote]:
    """The votes, with weights such that no user has more than a share of all weight of votes with users; with few
    users the share is at least twice an equal one. A share of the whole cannot be moved by inventing users with few
    votes, as a multiple of the median could."""
    totals: dict[str, float] = defaultdict(float)
    for vote in votes:
        if vote.user is not None:
            totals[vote.user] += vote.weight
    if not totals:
        return list(votes)
    sizes = np.array(list(totals.values()))
    share = max(max_share, 2 / len(sizes))
    most = float(sizes.max())
    for _ in range(200):  # falls to the largest total that is the share of the sum
        most = min(most, share * float(np.minimum(sizes, most).sum()))
    return [
        vote
        if vote.user is None or totals[vote.user] <= most
        else replace(vote, weight=vote.weight * most / totals[vote.user])
        for vote in votes
    ]


def _items(votes: Sequence[Vote]) -> Items:
    texts = sorted({text for vote in votes for text in (vote.chosen.completion, vote.rejected.completion)})
    place = {text: number for number, text in enumerate(texts)}
    words = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\S+", max_features=WORDS).fit_transform(texts)
    lengths = np.log1p([[len(text.split())] for text in texts])
    features = sparse.csr_matrix(sparse.hstack([words, lengths]))
    chosen = np.array([place[vote.chosen.completion] for vote in votes])
    rejected = np.array([place[vote.rejected.completion] for vote in votes])
    numbers: dict[object, int] = {}
    pairs = zip(votes, np.minimum(chosen, rejected), np.maximum(chosen, rejected), strict=True)
    same = [numbers.setdefault((vote.key, low, high), len(numbers)) for vote, low, high in pairs]
    return Items(
        features[chosen] - features[rejected],
        np.where(chosen < rejected, 1.0, -1.0),
        np.array(same),
        np.array([str(vote.user) for vote in votes]),
        np.array([min(1.0, vote.weight) for vote in votes]),
    )


def _expected(items: Items, weights: np.ndarray) -> np.ndarray:
    """The probability of each vote by what other users have said: float64 `[votes]`."""
    margins = np.zeros(len(items.sides))
    oriented = sparse.diags(items.sides) @ items.rows
    counted = weights * items.confidence
    for others, own in GroupKFold(min(FOLDS, len(set(items.users)))).split(oriented, groups=items.users):
        margins[own] = _margins(oriented[others], items.sides[others], counted[others], oriented[own])
    margins *= items.sides / max(float(margins.std()), 1e-9)
    # a slope makes the margins probabilities again, which the folds have not seen
    slope = _slope(margins, counted)
    found: np.ndarray = expit(slope * margins + _other_votes(items, weights))
    return found


def _margins(rows: sparse.csr_matrix, sides: np.ndarray, weights: np.ndarray, asked: sparse.csr_matrix) -> np.ndarray:
    if len(set(sides[weights > 0])) < 2:
        return np.zeros(asked.shape[0])
    model = LogisticRegression(C=RIDGE, fit_intercept=False, max_iter=1000)
    found: np.ndarray = model.fit(rows, sides, sample_weight=weights).decision_function(asked)
    return found


def _slope(margins: np.ndarray, weights: np.ndarray) -> float:
    """By how much margins of votes must be multiplied to be their log-odds; not below 0."""
    if not weights.sum() or not np.abs(margins).max():
        return 0.0
    both = np.concatenate([margins, -margins])[:, None]
    labels = np.repeat([1, 0], len(margins))
    model = LogisticRegression(C=10.0, fit_intercept=False).fit(both, labels, sample_weight=np.tile(weights, 2))
    return max(0.0, float(model.coef_[0, 0]))


def _other_votes(items: Items, weights: np.ndarray) -> np.ndarray:
    """What others' votes on the same two texts add to the log-odds of each vote."""
    accuracy = 0.5 + (TRUSTED - 0.5) * weights * items.confidence
    said = items.sides * logit(accuracy)
    totals = np.bincount(items.same, weights=said)
    own: dict[tuple[str, int], float] = defaultdict(float)
    for user, pair, value in zip(items.users, items.same, said, strict=True):
        own[user, pair] += value
    without = [own[user, pair] for user, pair in zip(items.users, items.same, strict=True)]
    found: np.ndarray = items.sides * (totals[items.same] - np.array(without))
    return found


def _weight(expected: np.ndarray, confidence: np.ndarray) -> float:
    """The weight of a user whose votes had these probabilities."""
    first, second = PRIOR
    log_posterior = (first - 1) * np.log(GRID) + (second - 1) * np.log(1 - GRID)
    likelihood = np.log(np.outer(GRID, expected) + np.outer(1 - GRID, 1 - expected))
    log_posterior = log_posterior + likelihood @ confidence
    posterior = np.exp(log_posterior - log_posterior.max())
    mean = float(posterior @ GRID / posterior.sum())
    return float(np.clip((2 * mean - 1) / (2 * TRUSTED - 1), 0.0, 1.0))
