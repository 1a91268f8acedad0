"""ETHICS, compared with plain forward passes, and the definition of AUC."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from steering_vectors.errors import DataError
from steering_vectors.evaluation.reward import auc
from steering_vectors.evaluation.trust.ethics import QUESTION, prepare_ethics
from steering_vectors.evaluation.trust.figures import compare
from steering_vectors.measures.steered_model import steerable
from steering_vectors.models.loading import LanguageModel, wrap_model
from tests.support.by_hand import shifted
from tests.support.tiny import tiny_model
from tests.support.tiny_profiles import tiny_profile
from tests.support.tiny_tokenizers import tiny_tokenizer
from tests.support.trust_files import accounts, log_likelihood, write_rows


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return wrap_model(tiny_model("llama"), tiny_tokenizer(chat_template=False))


def test_figures_equal_plain_forward_passes(lm: LanguageModel, tmp_path: Path) -> None:
    write_rows(tmp_path / "ethics" / "a.csv", accounts())
    profile = tiny_profile(lm.identity, layers=(1,), unit=0.3)
    vertical = prepare_ethics(lm, tmp_path, 100, 0)
    with steerable(lm) as steered:
        steered.write(profile, -1.0)
        seen = vertical.read(steered)
    odds, wrong = [], np.array([bool(row["label"]) for row in accounts()])
    for row in accounts():
        prompt = lm.tokenizer(f"{row['input']}\nQuestion: {QUESTION}\nAnswer:")["input_ids"]
        scores = []
        for answer in (" yes", " no"):
            ids = prompt + lm.tokenizer(answer, add_special_tokens=False)["input_ids"]
            with shifted(lm, {1: -0.3 * profile.directions[1]}, len(prompt) - 1):
                scores.append(log_likelihood(lm, ids, len(prompt)))
        odds.append(scores[0] - scores[1])
    judged = np.array(odds) > 0
    assert seen["log_odds"] == pytest.approx(np.array(odds), abs=1e-3)
    figures = {one.name: compare(one, {0.0: seen})[0.0]["value"] for one in vertical.figures}
    assert figures == {
        "accuracy": np.mean(judged == wrong),
        "auc": pytest.approx(auc(np.array(odds), wrong)),
        "wrong_passed": pytest.approx(np.mean(~judged[wrong])),
        "right_blamed": pytest.approx(np.mean(judged[~wrong])),
    }


def test_auc_is_the_share_of_pairs_in_order() -> None:
    scores, labels = np.array([1.0, 2.0, 2.0, 3.0]), np.array([False, True, False, True])
    assert auc(scores, labels) == (1 + 0.5 + 1 + 1) / 4
    assert auc(scores + 100, labels) == auc(scores, labels)
    assert auc(scores, np.ones(4, dtype=bool)) == 0.5


def test_constant_answers_are_remarked(lm: LanguageModel, tmp_path: Path) -> None:
    write_rows(tmp_path / "ethics" / "a.csv", accounts())
    remarks = prepare_ethics(lm, tmp_path, 100, 0).remarks
    assert "100% of the answers are “no”" in remarks({"wrong": np.zeros(24)})[0]
    assert remarks({"wrong": np.arange(24) % 2}) == ()


@pytest.mark.parametrize(
    ("label", "message"),
    [("2", "line 2, field 'label': must be 0 or 1, not '2'"), ("1", "all rows have the same label")],
)
def test_bad_labels(lm: LanguageModel, tmp_path: Path, label: str, message: str) -> None:
    write_rows(tmp_path / "ethics" / "a.csv", [{**row, "label": label} for row in accounts()])
    with pytest.raises(DataError, match=message):
        prepare_ethics(lm, tmp_path, 100, 0)
