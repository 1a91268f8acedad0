"""A score of texts that is not the steering itself: how much more like the preferred side a text reads.

Owns what a reward is, a small one that is fitted to preference data by words alone, and how good it is on rows that it
was not fitted to. Knows nothing of models' insides, of profiles or of strengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from steering_vectors.data.corpus import Corpus
from steering_vectors.data.preferences import MIN_SIDE
from steering_vectors.data.sides import Sides
from steering_vectors.errors import DataError
from steering_vectors.measures.controls import bootstrap

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
    """Log-odds that a text is a preferred response, by a logistic regression on its words and pairs of words.

    Weights are tf-idf with sublinear counts, of unit length per text, so a score does not grow with the text's length;
    both sides weigh the same. Raises DataError if the texts hold no word.
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
            raise DataError(f"no reward can be fitted to these responses ({error})") from error

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        return np.asarray(self._model.decision_function(list(texts)), dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Judged:
    """A reward, and what is known of it; `quality` is ready for JSON."""

    reward: Reward
    quality: dict[str, Any]


def judged(
    reward: Reward | None,
    trained: Corpus | None,
    fresh: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    most: int,
    seed: int = 0,
) -> Judged:
    """A reward with its quality on held-out rows; without a reward given, a WordReward fitted to other rows.

    `trained` are the rows that the profile was trained on, and the reward is fitted to; `fresh` it is tested on. Where
    `trained` is None, `fresh` is parted by prompts. Responses are cut to their first `most` tokens, as sampled texts
    are. Raises DataError if the rows cannot be parted.
    """
    if trained is None:
        trained, fresh = fresh.split(TEST_FRACTION, seed, min_side=MIN_SIDE)
    quality: dict[str, Any] = {}
    if reward is None:
        reward = WordReward(*texts_of(trained.sides().thinned(FITTED_ROWS), tokenizer, most))
        quality["fitted_rows"] = min(trained.pairs.rows, FITTED_ROWS)
    tested = fresh.sides().thinned(TESTED_ROWS)
    scores = [reward(texts) for texts in texts_of(tested, tokenizer, most)]
    quality |= {"tested_texts": sum(map(len, scores)), **separation(*scores, seed=seed)}
    return Judged(reward, {"name": reward.name, "unit": reward.unit, **quality})


def texts_of(sides: Sides, tokenizer: PreTrainedTokenizerBase, most: int) -> tuple[list[str], list[str]]:
    """The first `most` tokens of the responses as texts, preferred and rejected."""
    preferred, rejected = (
        tokenizer.batch_decode([list(ids[start : start + most]) for ids, start in examples], skip_special_tokens=True)
        for examples in (sides.positives, sides.negatives)
    )
    return list(preferred), list(rejected)


def separation(preferred: np.ndarray, rejected: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """Area under the ROC curve (the share of pairs, one of either side, that are scored in the right order, ties by
    half) with its 95 % bootstrap interval."""
    order = np.sign(preferred[:, None] - rejected[None, :]) / 2 + 0.5  # [preferred, rejected]

    def resampled(rows: np.ndarray) -> float:
        first, second = rows[rows < len(preferred)], rows[rows >= len(preferred)] - len(preferred)
        return float(order[np.ix_(first, second)].mean()) if len(first) and len(second) else 0.5

    return {"auc": float(order.mean()), "auc_95": bootstrap(resampled, sum(order.shape), draws=DRAWS, seed=seed)}
