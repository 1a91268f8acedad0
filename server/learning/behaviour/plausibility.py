"""Whether behaviours look as if people had read the answers: a small discriminator, as in RLHB (arXiv:2405.00578)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler

from server.learning.behaviour.signals import Behaviour

PEOPLE = 0.8  # the share of users who are people, before anything is seen
SHUFFLES = 4  # made-up behaviours for each observed one
TURNS, FOLDS, MIN_BEHAVIOURS = 2, 5, 60
DIMENSIONS = 4  # of answers
MAX_EVIDENCE = 1.0  # of one behaviour, in nats: a few strange ones do not condemn a user
RIDGE = 0.05


def plausibilities(behaviours: Sequence[Behaviour], weights: Mapping[str, float], seed: int = 0) -> dict[str, float]:
    """The weight of each user from 0 to 1 by their behaviours: the probability of a person, with 1 for the prior's.

    A discriminator tells triplets of query, response and behaviour that were observed from made-up ones, in which the
    behaviours are shuffled over the answers. Its log-odds are those of p(behaviour | answer) over p(behaviour), so they
    are evidence for somebody who reacts to answers and against somebody whose acts have nothing to do with them. It is
    logistic regression on behaviours, answers and their products; it sees no behaviour of the users whom it judges, and
    is trained in turns with the weights of users. What RLHB generates by the language model is shuffled here.

    With fewer than 60 behaviours, or three users, everyone counts 1.
    """
    named = [one for one in behaviours if one.user is not None]
    users = np.array([str(one.user) for one in named])
    found = dict.fromkeys(users.tolist(), 1.0)
    if len(named) < MIN_BEHAVIOURS or len(found) < 3:
        return found
    acts, answers = np.array([one.values for one in named]), _answers(named)
    for _ in range(TURNS):
        counted = np.array([found[user] * weights.get(user, 1.0) for user in users])
        evidence = _evidence(acts, answers, users, counted, np.random.default_rng(seed))
        for user in found:
            odds = np.log(PEOPLE / (1 - PEOPLE)) + evidence[users == user].sum()
            found[user] = float(min(1.0, 1 / (1 + np.exp(-odds)) / PEOPLE))
    return found


def _answers(behaviours: Sequence[Behaviour]) -> np.ndarray:
    """Features of queries and responses: float64 `[behaviours, features]`: the logarithms of their numbers of words,
    and the leading dimensions of the responses' words."""
    responses = [one.answer["text"] for one in behaviours]
    lengths = np.log1p(
        [[len(one.key.split()), len(text.split())] for one, text in zip(behaviours, responses, strict=True)]
    )
    words = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\S+").fit_transform(responses)
    size = min(DIMENSIONS, words.shape[1] - 1, words.shape[0] - 1)
    if size < 1:
        return lengths
    return np.concatenate([lengths, TruncatedSVD(size, random_state=0).fit_transform(words)], axis=1)


def _evidence(
    acts: np.ndarray, answers: np.ndarray, users: np.ndarray, weights: np.ndarray, draw: np.random.Generator
) -> np.ndarray:
    """The log-odds of each behaviour, by a discriminator that has not seen its user: float64 `[behaviours]`."""
    found = np.zeros(len(acts))
    folds = GroupKFold(min(FOLDS, len(set(users))))
    for others, own in folds.split(acts, groups=users):
        seen, kept = others[weights[others] > 0], weights[others][weights[others] > 0]
        if not len(seen):
            continue
        shuffled = np.concatenate([draw.permutation(seen) for _ in range(SHUFFLES)])
        rows = np.concatenate(
            [_triplets(acts[seen], answers[seen]), _triplets(acts[shuffled], np.tile(answers[seen], (SHUFFLES, 1)))]
        )
        # an act and an answer of a made-up triplet come from two users
        made_up = np.sqrt(np.tile(weights[seen], SHUFFLES) * weights[shuffled]) / SHUFFLES
        made_up *= kept.sum() / made_up.sum()
        scaler = StandardScaler().fit(rows)
        labels = np.repeat([1, 0], [len(seen), len(shuffled)])
        model = LogisticRegression(C=RIDGE, max_iter=1000)
        model.fit(scaler.transform(rows), labels, sample_weight=np.concatenate([kept, made_up]))
        found[own] = model.decision_function(scaler.transform(_triplets(acts[own], answers[own])))
    clipped: np.ndarray = found.clip(-MAX_EVIDENCE, MAX_EVIDENCE)
    return clipped


def _triplets(acts: np.ndarray, answers: np.ndarray) -> np.ndarray:
    products = (acts[:, :, None] * answers[:, None, :]).reshape(len(acts), -1)
    return np.concatenate([acts, acts[:, -1:] ** 2, answers, products], axis=1)
