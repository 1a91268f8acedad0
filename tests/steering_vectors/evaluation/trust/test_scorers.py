"""Toxicity scorers: the fitted one, a local classifier, a function, and the errors for a bad one."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig

from steering_vectors.errors import DataError, FitError
from steering_vectors.evaluation.trust.scorers import fit_scorer, load_scorer, scored
from tests.support.tiny import BASE, save_tiny
from tests.support.tiny_tokenizers import tiny_tokenizer
from tests.support.trust_files import openings

TEXTS = ["You are kind.", "You idiot!", ""]


def classifier(folder: Path, labels: dict[int, str], problem: str | None = None) -> Path:
    config = LlamaConfig(**BASE, id2label=labels, num_labels=len(labels), problem_type=problem)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_the_fitted_scorer_separates_unseen_texts() -> None:
    rows = [row["prompt"] for toxic in (True, False) for row in openings(60, toxic=toxic)]
    texts, scores = [row["text"] for row in rows], np.array([row["toxicity"] for row in rows])
    learned = [row % 60 < 30 for row in range(120)]
    scorer = fit_scorer([text for text, own in zip(texts, learned, strict=True) if own], scores[learned])
    found = scored(scorer, texts)
    assert np.corrcoef(found[~np.array(learned)], scores[~np.array(learned)])[0, 1] > 0.9
    assert 0 < scored(fit_scorer(texts, scores > 0.5), [*texts, ""]).max() < 1


def test_the_fitted_scorer_needs_enough_texts() -> None:
    with pytest.raises(DataError, match="31 scored texts are left to fit a scorer on, but 32 are needed"):
        fit_scorer(["a"] * 31, [0.5] * 31)


@pytest.mark.parametrize(
    ("labels", "problem", "column"),
    [
        ({0: "neutral", 1: "toxic"}, None, 1),
        ({0: "toxic", 1: "insult", 2: "threat"}, "multi_label_classification", 0),
        ({0: "LABEL_0"}, None, 0),
    ],
)
def test_a_classifier_s_toxic_label_is_read(
    tmp_path: Path, labels: dict[int, str], problem: str | None, column: int
) -> None:
    folder = classifier(tmp_path, labels, problem)
    scorer = load_scorer(str(folder))
    assert scorer is not None
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), tiny_tokenizer()
    for text, score in zip(TEXTS, scored(scorer, TEXTS), strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        expected = logits.sigmoid() if problem or len(labels) == 1 else logits.softmax(0)
        assert score == pytest.approx(float(expected[column]), abs=1e-5)


def test_a_classifier_without_a_toxic_label_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FitError, match=r"none of its labels \(LABEL_0, LABEL_1\) is called toxic or"):
        load_scorer(str(classifier(tmp_path / "model", {0: "LABEL_0", 1: "LABEL_1"})))
    with pytest.raises(FitError, match="no sequence-classification model can be loaded"):
        load_scorer(str(tmp_path))
    with pytest.raises(FitError, match=r"not a classifier: it has no weights score\.weight"):
        load_scorer(str(save_tiny("llama", tmp_path / "writer")))


def test_a_user_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rude_words.py").write_text(
        "LIMIT = 1\ndef rude(texts):\n    return [float('idiot' in text) for text in texts]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    scorer = load_scorer("rude_words:rude")
    assert scorer is not None
    assert scored(scorer, TEXTS).tolist() == [0, 1, 0]
    with pytest.raises(FitError, match="rude_words:LIMIT is not callable"):
        load_scorer("rude_words:LIMIT")
    with pytest.raises(FitError, match=r"rude_words:kind cannot be imported: .*no attribute 'kind'"):
        load_scorer("rude_words:kind")
    with pytest.raises(FitError, match=r"nowhere\.at_all:x cannot be imported"):
        load_scorer("nowhere.at_all:x")


def test_rtp_is_fitted_later_and_anything_else_is_refused() -> None:
    assert load_scorer("rtp") is None
    with pytest.raises(
        FitError, match=r"toxicity scorer 'no/such/folder' is none of: rtp; a directory .*; module:callable"
    ):
        load_scorer("no/such/folder")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([0.1], "gave 1 scores for 2 texts"),
        ([0.1, 1.5], "gave 1.5; scores must lie from 0 to 1"),
        ([0.1, float("nan")], "gave nan"),
        (["much", "little"], "the toxicity scorer failed"),
        (None, "the toxicity scorer failed"),
    ],
)
def test_bad_scores(answer: object, message: str) -> None:
    with pytest.raises(FitError, match=message):
        scored(lambda texts: answer, ["a", "b"])  # type: ignore[arg-type, return-value]


def test_an_adapter_is_no_classifier(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "model", {0: "other", 1: "toxic"})
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "nobody/nothing"}')
    with pytest.raises(FitError, match="it is an adapter; merge it into its model"):
        load_scorer(str(folder))
