"""CrowS-Pairs, compared with plain forward passes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from steering_vectors.errors import DataError
from steering_vectors.evaluation.trust.bias import prepare_bias
from steering_vectors.measures.steered_model import steerable
from steering_vectors.models.loading import LanguageModel, wrap_model
from tests.support.by_hand import shifted
from tests.support.tiny import tiny_model
from tests.support.tiny_profiles import tiny_profile
from tests.support.tiny_tokenizers import tiny_tokenizer
from tests.support.trust_files import log_likelihood, sentence_pairs, write_rows


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return wrap_model(tiny_model("llama"), tiny_tokenizer())


@pytest.mark.parametrize("strength", [0.0, 1.5])
def test_the_share_equals_plain_forward_passes(lm: LanguageModel, tmp_path: Path, strength: float) -> None:
    write_rows(tmp_path / "crows-pairs" / "a.csv", sentence_pairs())
    profile = tiny_profile(lm.identity, layers=(1,), unit=0.3)
    vertical = prepare_bias(lm, tmp_path, 100, 0)
    with steerable(lm) as steered:
        steered.write(profile, strength)
        seen = vertical.read(steered)
    margins = []
    for row in sentence_pairs():
        scores = []
        for column in ("sent_more", "sent_less"):
            with shifted(lm, {1: strength * 0.3 * profile.directions[1]}, 0):
                scores.append(log_likelihood(lm, lm.tokenizer(row[column])["input_ids"], 1))
        margins.append(scores[0] - scores[1])
    assert seen["stereotyped"].tolist() == (np.array(margins) > 0).tolist()
    assert 0 < seen["stereotyped"].mean() < 1
    assert seen["distance"] == pytest.approx(np.abs(margins), abs=1e-3)


def test_large_types_are_parts(lm: LanguageModel, tmp_path: Path) -> None:
    write_rows(tmp_path / "crows-pairs" / "a.csv", sentence_pairs(18))
    parts = prepare_bias(lm, tmp_path, 100, 0).parts
    assert {name: rows.tolist() for name, rows in parts.items()} == {
        "age": list(range(0, 18, 2)),
        "gender": list(range(1, 18, 2)),
    }
    write_rows(tmp_path / "crows-pairs" / "a.csv", sentence_pairs(15))
    assert list(prepare_bias(lm, tmp_path, 100, 0).parts) == ["age"]


def test_rows_that_do_not_fit_are_counted(lm: LanguageModel, tmp_path: Path) -> None:
    rows = sentence_pairs(20)
    for row in rows[:4]:
        row["sent_more"] *= 20
    write_rows(tmp_path / "crows-pairs" / "a.csv", rows)
    vertical = prepare_bias(lm, tmp_path, 100, 0)
    assert (vertical.rows, vertical.left_out) == (16, 4)
    for row in rows[:15]:
        row["sent_more"] *= 20
    write_rows(tmp_path / "crows-pairs" / "a.csv", rows)
    with pytest.raises(DataError, match="only 5 of 20 rows fit the model's context of 256 tokens"):
        prepare_bias(lm, tmp_path, 100, 0)
