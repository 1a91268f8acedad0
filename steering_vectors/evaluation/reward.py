"""Rewards: scores of texts, a small one fitted to preference data, and its quality on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from steering_vectors.data.corpus import Corpus, Sides
from steering_vectors.data.preferences import MIN_SIDE
from steering_vectors.errors import DataError
from steering_vectors.measures.controls import bootstrap
from steering_vectors.measures.results import Interval, RewardQuality

WORDS = r"(?u)\w+|[^\w\s]"
TEST_FRACTION = 0.2
FITTED_ROWS = 4096
TESTED_ROWS = 256  # of either side
DRAWS = 500


class Reward(Protocol):
    """Anything that scores texts, higher for better: a classifier, a reward model, a rule."""

    name: str
    unit: str

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """One finite score per text: float64 `[texts]`."""
        ...


class WordReward:
    """Log-odds that a text is a preferred response, by a logistic regression on words and pairs of words.

    Features are tf-idf with sublinear counts and unit length, so the score does not grow with the length of the text.
    Both sides have equal weight. Raises DataError if the texts hold no word.
    """

    name = "logistic regression on words and pairs of words"
    unit = "log-odds"

    def __init__(self, preferred: Sequence[str], rejected: Sequence[str]) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        words = TfidfVectorizer(ngram_range=(1, 2), token_pattern=WORDS, sublinear_tf=True)
        self._model = make_pipeline(words, LogisticRegression(class_weight="balanced", max_iter=1000))
        try:
            self._model.fit([*preferred, *rejected], [1] * len(preferred) + [0] * len(rejected))
        except ValueError as error:
            raise DataError(f"no reward can be fitted to these responses ({error}); pass a reward") from error

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        return np.asarray(self._model.decision_function(list(texts)), dtype=np.float64)


def judged(
    reward: Reward | None,
    trained: Corpus | None,
    fresh: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    seed: int = 0,
) -> tuple[Reward, RewardQuality]:
    """Measure a reward on held-out rows; without one, fit a `WordReward` to other rows first.

    The reward is fitted to `trained`, the rows that the profile was trained on, and tested on `fresh`. If `trained` is
    None, `fresh` is split by prompt. Responses are truncated to `max_tokens`, as sampled texts are. Raises DataError if
    the rows cannot be split.
    """
    if trained is None:
        trained, fresh = fresh.split(TEST_FRACTION, seed, min_side=MIN_SIDE)
    tested = texts_of(fresh.sides().thinned(TESTED_ROWS), tokenizer, max_tokens)
    given = reward
    if reward is None:
        reward = WordReward(*texts_of(trained.sides().thinned(FITTED_ROWS), tokenizer, max_tokens))
    scores = [reward(texts) for texts in tested]
    auc, auc_95 = separation(*scores, seed=seed)
    quality: RewardQuality = {
        "name": reward.name,
        "unit": reward.unit,
        "tested_texts": sum(map(len, scores)),
        "auc": auc,
        "auc_95": auc_95,
    }
    if given is None:
        quality["fitted_rows"] = min(trained.pairs.rows, FITTED_ROWS)
    return reward, quality


def texts_of(sides: Sides, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> tuple[list[str], list[str]]:
    """The preferred and the rejected responses as texts, truncated to `max_tokens`."""
    preferred, rejected = (
        tokenizer.batch_decode([ids[start : start + max_tokens] for ids, start in examples], skip_special_tokens=True)
        for examples in (sides.positives, sides.negatives)
    )
    return list(preferred), list(rejected)


def separation(preferred: np.ndarray, rejected: np.ndarray, *, seed: int = 0) -> tuple[float, Interval]:
    """AUC of preferred against rejected texts, and its 95 % bootstrap interval."""
    scores = np.concatenate([preferred, rejected])
    labels = np.arange(len(scores)) < len(preferred)
    drawn = bootstrap(lambda rows: auc(scores[rows], labels[rows]), len(scores), draws=DRAWS, seed=seed)
    return auc(scores, labels), drawn


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Share of pairs of a positive and a negative that are ordered correctly, ties counting half; 0.5 without pairs."""
    gaps = scores[labels][:, None] - scores[~labels]
    return float((gaps > 0).mean() + (gaps == 0).mean() / 2) if gaps.size else 0.5
