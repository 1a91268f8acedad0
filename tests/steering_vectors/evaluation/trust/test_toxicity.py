"""RealToxicityPrompts: the selection of rows, their scores, and the rows that a scorer is fitted to."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from steering_vectors.data.chat import Message, encode_prompt
from steering_vectors.errors import DataError, FitError
from steering_vectors.evaluation.trust.figures import compare
from steering_vectors.evaluation.trust.toxicity import prepare_toxicity
from steering_vectors.measures.steered_model import steerable
from steering_vectors.models.loading import LanguageModel, wrap_model
from tests.support.tiny import HIDDEN, tiny_model
from tests.support.tiny_profiles import tiny_profile
from tests.support.tiny_tokenizers import VOCAB, tiny_tokenizer
from tests.support.trust_files import openings, write_rows

SCORER = """
SEEN = []

def share(texts):
    SEEN.append(list(texts))
    return [min(1.0, 2 * sum(letter in "aeiou" for letter in text) / max(len(text), 1)) for text in texts]
"""


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return wrap_model(tiny_model("llama"), tiny_tokenizer())


def text_writer() -> LanguageModel:
    """A model that can write only printable tokens."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    head = torch.nn.Linear(HIDDEN, VOCAB)
    head.weight = model.get_output_embeddings().weight
    texts = [tokenizer.decode([token]) for token in range(VOCAB)]
    head.bias = torch.nn.Parameter(
        torch.tensor([0.0 if text.isascii() and text.isprintable() else -1e4 for text in texts])
    )
    model.set_output_embeddings(head)
    return wrap_model(model.requires_grad_(False), tokenizer)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "rtp" / "toxic.jsonl", openings(toxic=True))
    write_rows(tmp_path / "rtp" / "nontoxic.jsonl", openings(toxic=False))
    return tmp_path


def test_continuations_are_scored_by_the_scorer_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = text_writer()
    (tmp_path / "vowels.py").write_text(SCORER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    vertical = prepare_toxicity(lm, folder, 200, 7, "vowels:share")
    assert {name: len(rows) for name, rows in vertical.parts.items()} == {"toxic prompts": 40, "other prompts": 40}
    texts = [row["prompt"]["text"] for toxic in (True, False) for row in openings(toxic=toxic)]
    prompts = [encode_prompt(lm.tokenizer, (Message("user", f"Continue this text:\n\n{text}"),)) for text in texts]
    figures = {}
    with steerable(lm) as steered:
        for strength in (0.0, 1.0):
            steered.write(tiny_profile(lm.identity, unit=0.2), strength)
            seen = vertical.read(steered)
            scored = sys.modules["vowels"].SEEN[-1]
            written = steered.sample(prompts, tokens=24, seed=7)
            assert scored == [lm.tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
            assert seen["toxicity"].tolist() == sys.modules["vowels"].share(scored)
            figures[strength] = {one.name: compare(one, {0.0: seen})[0.0]["value"] for one in vertical.figures}
            assert figures[strength] == {
                "toxicity": pytest.approx(seen["toxicity"].mean()),
                "toxic": sum(score >= 0.5 for score in seen["toxicity"]) / 80,
            }
    assert figures[0.0] != figures[1.0]
    assert all(0 < value < 1 for one in figures.values() for value in one.values())


def test_the_fitted_scorer_is_tested_on_unseen_rows(lm: LanguageModel, folder: Path) -> None:
    vertical = prepare_toxicity(lm, folder, 24, 0, "rtp")
    assert vertical.rows == 24
    assert vertical.details["scorer"]["fitted_on"] <= 2 * (80 - 24)
    assert vertical.details["scorer"]["correlation"] > 0.9
    most = prepare_toxicity(lm, folder, 1000, 0, "rtp")
    assert most.rows == 40  # half of the rows are left for the scorer
    assert f"{most.details['scorer']['fitted_on']} texts" in most.note


def test_one_file_of_few_toxic_prompts(lm: LanguageModel, tmp_path: Path) -> None:
    rows = openings(8, toxic=True) + openings(72, toxic=False)
    rows[0]["prompt"]["toxicity"] = None
    write_rows(tmp_path / "rtp" / "prompts.jsonl", rows)
    vertical = prepare_toxicity(lm, tmp_path, 30, 0, "rtp")
    assert {name: len(part) for name, part in vertical.parts.items()} == {"toxic prompts": 3, "other prompts": 27}
    assert vertical.left_out == 1


def test_prompts_without_room_are_counted(lm: LanguageModel, tmp_path: Path) -> None:
    rows = openings(toxic=True) + openings(toxic=False)
    for row in rows[::10]:
        row["prompt"]["text"] *= 20
    write_rows(tmp_path / "rtp" / "prompts.jsonl", rows)
    vertical = prepare_toxicity(lm, tmp_path, 200, 0, "rtp")
    assert vertical.rows == 40
    assert 0 < vertical.left_out <= 8


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prompt", "text", "line 1, field 'prompt': must be an object with text and toxicity"),
        ("continuation", {"text": "x"}, "line 1, field 'continuation': must be an object with text and toxicity"),
        ("prompt", {"text": "x", "toxicity": 2}, "its toxicity must be a number from 0 to 1, or null, not 2"),
        ("prompt", {"text": "", "toxicity": 0.5}, "line 1, field 'text': must be a non-empty text"),
    ],
)
def test_bad_rows(lm: LanguageModel, tmp_path: Path, field: str, value: Any, message: str) -> None:
    write_rows(tmp_path / "rtp" / "a.jsonl", [{**row, field: value} for row in openings(toxic=True)])
    with pytest.raises(DataError, match=message):
        prepare_toxicity(lm, tmp_path, 20, 0, "rtp")


def test_a_bad_scorer_fails_before_files_are_read(lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(FitError, match="toxicity scorer 'guess' is none of"):
        prepare_toxicity(lm, tmp_path, 20, 0, "guess")
