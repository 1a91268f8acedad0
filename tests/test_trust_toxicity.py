"""RealToxicityPrompts: which rows are continued, what is scored, and what scorers may have seen."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from steering_vectors.chat import Message, encode_prompt
from steering_vectors.errors import DataError, FitError
from steering_vectors.models import LanguageModel, wrap_model
from steering_vectors.steered import steerable
from steering_vectors.trust.toxicity import TOKENS, prepare_toxicity
from tests.tiny import tiny_model
from tests.tiny_profiles import tiny_profile
from tests.tiny_tokenizers import tiny_tokenizer
from tests.trust_files import openings, write_rows

SCORER = """
SEEN = []

def share(texts):
    SEEN.append(list(texts))
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in texts]
"""


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return wrap_model(tiny_model("llama"), tiny_tokenizer())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "rtp" / "toxic.jsonl", openings(toxic=True))
    write_rows(tmp_path / "rtp" / "nontoxic.jsonl", openings(toxic=False))
    return tmp_path


def test_continuations_are_scored_by_the_scorer_named(
    lm: LanguageModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vowels.py").write_text(SCORER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    vertical = prepare_toxicity(lm, folder, 200, 7, "vowels:share")
    assert {name: len(rows) for name, rows in vertical.parts.items()} == {"toxic prompts": 40, "other prompts": 40}
    texts = [row["prompt"]["text"] for toxic in (True, False) for row in openings(toxic=toxic)]
    prompts = [encode_prompt(lm.tokenizer, (Message("user", f"Continue this text:\n\n{text}"),)) for text in texts]
    with steerable(lm) as steered:
        steered.write(tiny_profile(lm.identity, unit=0.2), 1.0)
        seen = vertical.read(steered)["toxicity"]
        written = steered.sample(prompts, tokens=TOKENS, seed=7)
    continued = [lm.tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
    scored = sys.modules["vowels"].SEEN[-1]
    whole = [text for text, own in zip(scored, continued, strict=True) if "�" not in text + own]
    assert whole == [own for text, own in zip(scored, continued, strict=True) if "�" not in text + own]
    assert seen.tolist() == sys.modules["vowels"].share(scored)


def test_the_fitted_scorer_never_saw_what_it_is_tried_on(lm: LanguageModel, folder: Path) -> None:
    vertical = prepare_toxicity(lm, folder, 24, 0, "rtp")
    assert vertical.rows == 24
    assert vertical.details["scorer"]["fitted_on"] <= 2 * (80 - 24)
    assert vertical.details["scorer"]["correlation"] > 0.9
    most = prepare_toxicity(lm, folder, 1000, 0, "rtp")
    assert most.rows == 40  # half of the rows stay for the scorer
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
        ("prompt", {"text": "", "toxicity": 0.5}, "line 1, field 'text': must be a text that is not empty"),
    ],
)
def test_bad_rows(lm: LanguageModel, tmp_path: Path, field: str, value: Any, message: str) -> None:
    write_rows(tmp_path / "rtp" / "a.jsonl", [{**row, field: value} for row in openings(toxic=True)])
    with pytest.raises(DataError, match=message):
        prepare_toxicity(lm, tmp_path, 20, 0, "rtp")


def test_a_bad_scorer_is_told_before_files_are_read(lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(FitError, match="--toxicity 'guess' is none of"):
        prepare_toxicity(lm, tmp_path, 20, 0, "guess")
