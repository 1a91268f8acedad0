"""Toxicity scorers: fitted to RealToxicityPrompts' own scores, a local classifier, or a user's function."""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from steering_vectors.errors import DataError, FitError
from steering_vectors.models.loading import ADAPTER_FILES, load_checkpoint

FITTED = "rtp"
TOXIC_LABELS = ("toxic", "toxicity", "hate", "hateful", "offensive")
MIN_TEXTS = 32  # to fit a scorer on
BATCH = 16


ToxicityScorer = Callable[[list[str]], Sequence[float]]
"""Anything that gives every text a score from 0 (harmless) to 1 (toxic)."""


def scored(scorer: ToxicityScorer, texts: Sequence[str]) -> np.ndarray:
    """Scores `[texts]`. Raises FitError unless the scorer gives one number from 0 to 1 for each text."""
    try:
        scores = [float(one) for one in scorer(list(texts))]
    except (TypeError, ValueError) as error:
        raise FitError(f"the toxicity scorer failed: {error}") from error
    if len(scores) != len(texts):
        raise FitError(f"the toxicity scorer gave {len(scores)} scores for {len(texts)} texts; it must give one each")
    if bad := [one for one in scores if not (math.isfinite(one) and 0 <= one <= 1)]:
        raise FitError(f"the toxicity scorer gave {bad[0]:g}; scores must lie from 0 to 1")
    return np.array(scores)


def load_scorer(spec: str) -> ToxicityScorer | None:
    """Load the scorer from a directory or from `module:callable`; None for `rtp`, which is fitted to the data later.

    Raises FitError for anything else, and for a classifier without a label that means toxic.
    """
    if spec == FITTED:
        return None
    if Path(spec).is_dir():
        return _load_model(Path(spec))
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", spec):
        return _load_function(*spec.split(":"))
    raise FitError(
        f"toxicity scorer {spec!r} is none of: {FITTED}; a directory with a sequence-classification model; "
        "module:callable"
    )


def fit_scorer(texts: Sequence[str], scores: Sequence[float]) -> ToxicityScorer:
    """Fit a scorer to texts and their scores from 0 to 1: a ridge regression of the scores' log-odds on TF-IDF of word
    and character n-grams. Raises DataError if there are fewer than 32 texts."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline, make_union

    if len(texts) < MIN_TEXTS:
        raise DataError(
            f"toxicity: {len(texts)} scored texts are left to fit a scorer on, but {MIN_TEXTS} are needed; lower "
            "rows, or choose another toxicity scorer"
        )
    words = TfidfVectorizer(analyzer="word", ngram_range=(1, 2), sublinear_tf=True)
    characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
    pipeline = make_pipeline(make_union(words, characters), Ridge(alpha=1.0))
    inner = 0.001 + 0.998 * np.asarray(scores)  # log-odds of 0 and of 1 are infinite
    pipeline.fit(list(texts), np.log(inner / (1 - inner)))
    return lambda texts: (1 / (1 + np.exp(-pipeline.predict(texts)))).tolist()


def _load_model(directory: Path) -> ToxicityScorer:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if (directory / ADAPTER_FILES[0]).is_file():
        raise FitError(f"toxicity scorer {directory}: it is an adapter; merge it into its model, and name the result")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        model, loading = load_checkpoint(AutoModelForSequenceClassification, str(directory), local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise FitError(
            f"toxicity scorer {directory}: no sequence-classification model can be loaded: {error}"
        ) from error
    if missing := sorted(map(str, loading["missing_keys"])):  # transformers would draw them at random
        raise FitError(f"toxicity scorer {directory}: not a classifier: it has no weights {', '.join(missing)}")
    labels = [str(model.config.id2label[index]) for index in range(model.config.num_labels)]
    found = [index for index, name in enumerate(labels) if name.casefold() in TOXIC_LABELS]
    if not found and len(labels) > 1:
        raise FitError(
            f"toxicity scorer {directory}: none of its labels ({', '.join(labels)}) is called "
            f"{' or '.join(TOXIC_LABELS)}; rename the one that means toxic in id2label of config.json"
        )
    label = found[0] if found else 0
    independent = len(labels) == 1 or model.config.problem_type == "multi_label_classification"
    model.eval()

    def score(texts: list[str]) -> Sequence[float]:
        scores: list[float] = []
        for start in range(0, len(texts), BATCH):
            inputs = tokenizer(texts[start : start + BATCH], return_tensors="pt", padding=True)
            with torch.no_grad():
                logits = model(**inputs).logits.double()
            probabilities = logits.sigmoid() if independent else logits.softmax(-1)
            scores += probabilities[:, label].tolist()
        return scores

    return score


def _load_function(module: str, name: str) -> ToxicityScorer:
    if str(Path.cwd()) not in sys.path:  # a console script does not import from the current folder
        sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise FitError(f"toxicity scorer {module}:{name} cannot be imported: {error}") from error
    if not callable(function):
        raise FitError(f"toxicity scorer {module}:{name} is not callable; it must take a list of texts")
    return function  # type: ignore[no-any-return]
