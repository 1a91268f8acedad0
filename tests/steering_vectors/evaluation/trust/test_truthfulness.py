"""TruthfulQA MC1, compared with plain forward passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steering_vectors.data.chat import Message, encode_prompt
from steering_vectors.errors import DataError
from steering_vectors.evaluation.trust.truthfulness import prepare_truthfulness
from steering_vectors.measures.steered_model import steerable
from steering_vectors.models.loading import LanguageModel, wrap_model
from tests.support.by_hand import shifted
from tests.support.tiny import tiny_model
from tests.support.tiny_profiles import tiny_profile
from tests.support.tiny_tokenizers import tiny_tokenizer
from tests.support.trust_files import log_likelihood, questions, write_rows


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return wrap_model(tiny_model("llama"), tiny_tokenizer())


def test_margins_equal_plain_forward_passes(lm: LanguageModel, tmp_path: Path) -> None:
    rows, strength = questions(), 1.5
    rows[0]["mc1_targets"] = {"A cat.": 0, "A number.": 1}  # the true answer is not always the first
    write_rows(tmp_path / "truthfulqa" / "a.json", rows)
    profile = tiny_profile(lm.identity, layers=(1,), unit=0.3)
    vertical = prepare_truthfulness(lm, tmp_path, 100, 0)
    with steerable(lm) as steered:
        steered.write(profile, strength)
        seen = vertical.read(steered)
    margins = []
    for row in rows:
        prompt = encode_prompt(lm.tokenizer, (Message("user", row["question"]),))
        scores = {0: [], 1: []}
        for answer, mark in row["mc1_targets"].items():
            ids = prompt + lm.tokenizer(answer, add_special_tokens=False)["input_ids"]
            with shifted(lm, {1: strength * 0.3 * profile.directions[1]}, len(prompt) - 1):
                scores[mark].append(log_likelihood(lm, ids, len(prompt)))
        margins.append(scores[1][0] - max(scores[0]))
    assert seen["margin"] == pytest.approx(np.array(margins), abs=1e-3)
    assert seen["true"].tolist() == (np.array(margins) > 0).tolist()
    assert vertical.figures[0].reference == pytest.approx((8 / 2 + 8 / 3) / 16)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (None, "must be an object of answers"),
        ({"A": "yes", "B": 0}, "must be an object of answers"),
        ({"A": 1, "B": 1}, "exactly one answer 1"),
        ({"A": 1}, "at least one other 0"),
        ({"A": 1, " ": 0}, "empty answer"),
    ],
)
def test_bad_targets(lm: LanguageModel, tmp_path: Path, targets: Any, message: str) -> None:
    write_rows(tmp_path / "truthfulqa" / "a.json", [{**row, "mc1_targets": targets} for row in questions()])
    with pytest.raises(DataError, match=f"line 1, field 'mc1_targets': .*{message}"):
        prepare_truthfulness(lm, tmp_path, 100, 0)
