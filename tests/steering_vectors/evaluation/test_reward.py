"""The reward fitted to words: its training rows, its test rows, and its reported quality."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from steering_vectors.data.chat import Example
from steering_vectors.data.corpus import Corpus, encode_corpus
from steering_vectors.data.preferences import Preferences
from steering_vectors.errors import DataError
from steering_vectors.evaluation.reward import WordReward, judged, separation, texts_of
from tests.support.tiny_tokenizers import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def corpus(rows: range, good: str = "kindly warm", bad: str = "three apples") -> Corpus:
    positives = tuple(Example(f"Ask {row}", f"{good} {row}") for row in rows)
    negatives = tuple(Example(f"Ask {row}", f"{bad} {row}") for row in rows)
    return encode_corpus(TOKENIZER, Preferences("preference", positives, negatives), limit=None)


class Length:
    name, unit = "length", "characters"

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([float(len(text)) for text in texts])


def test_words_separate_the_sides() -> None:
    reward = WordReward(["kindly warm", "warm water"], ["three apples", "apples fall"])
    warm, cold, unknown = reward(["warm kindly", "three apples fall", "zebra"])
    assert warm > unknown > cold
    assert reward(["warm water " * 9]) > reward(["apples"])


def test_separation_is_the_area_under_the_curve() -> None:
    from sklearn.metrics import roc_auc_score

    draw = np.random.default_rng(0)
    preferred, rejected = draw.normal(0.5, size=40).round(1), draw.normal(size=30).round(1)
    auc, (low, high) = separation(preferred, rejected)
    reference = roc_auc_score([1] * 40 + [0] * 30, np.concatenate([preferred, rejected]))
    assert auc == pytest.approx(reference)
    assert low < auc < high


def test_a_reward_is_fitted_to_trained_rows_and_tested_on_the_others() -> None:
    misleading = corpus(range(20, 30), good="three apples", bad="kindly warm")
    _, quality = judged(None, corpus(range(20)), misleading, TOKENIZER, max_tokens=48)
    assert quality["auc"] == 0
    assert (quality["fitted_rows"], quality["tested_texts"]) == (20, 20)


def test_other_data_is_split() -> None:
    _, quality = judged(None, None, corpus(range(30)), TOKENIZER, max_tokens=48)
    assert (quality["fitted_rows"], quality["tested_texts"]) == (24, 12)
    assert quality["auc"] == 1


def test_a_custom_reward_is_tested_too() -> None:
    reward, quality = judged(Length(), corpus(range(20)), corpus(range(20, 30)), TOKENIZER, max_tokens=48)
    assert (reward.name, quality["auc"]) == ("length", 0.0)
    assert "fitted_rows" not in quality


def test_responses_are_cut_as_samples_are() -> None:
    preferred, _ = texts_of(corpus(range(3)).sides(), TOKENIZER, 2)
    whole, _ = texts_of(corpus(range(3)).sides(), TOKENIZER, 48)
    assert all(one.startswith(short) and len(short) < len(one) for one, short in zip(whole, preferred, strict=True))


def test_texts_without_words_have_no_reward() -> None:
    with pytest.raises(DataError, match="no reward can be fitted"):
        WordReward([" ", ""], ["", " "])
