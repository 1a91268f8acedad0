"""Truthfulness: TruthfulQA, MC1 (arXiv:2109.07958).

The true answer must have the highest log-likelihood, not divided by length. Questions are asked zero-shot, because the
paper's six examples would not fit a short context.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from steering_vectors.data.tables import BadRow
from steering_vectors.evaluation.trust.figures import Columns, Figure, Vertical
from steering_vectors.evaluation.trust.rows import read_source, reader_for, require_rows, select, text_cell
from steering_vectors.measures.steered_model import SteeredModel
from steering_vectors.models.loading import LanguageModel


def prepare_truthfulness(lm: LanguageModel, folder: Path, rows: int, seed: int) -> Vertical:
    """Prepare TruthfulQA for a model: columns `question`, and `mc1_targets` with the one true answer marked 1. Raises
    DataError for unusable data."""
    reader = reader_for(lm)
    source = read_source(folder, "truthfulness", _parse)
    chosen, left_out = select(
        source.rows,
        rows,
        seed,
        lambda row: reader.answers(reader.prompt(chat=row[0], plain=f"Q: {row[0]}\nA:"), row[1]),
        reader.fits,
    )
    require_rows(len(chosen), left_out, "truthfulness", reader.limit)
    examples = [answer for answers in chosen for answer in answers]
    starts = [0, *accumulate(len(answers) for answers in chosen)][:-1]

    def read(steered: SteeredModel) -> Columns:
        scores = steered.log_likelihoods(examples, steer=True)[0].numpy()
        truths, others = scores[starts], scores.copy()
        others[starts] = -np.inf
        margins = truths - np.maximum.reduceat(others, starts)
        return {"true": (margins > 0).astype(float), "margin": margins}

    chance = float(np.mean([1 / len(answers) for answers in chosen]))
    figures = (
        Figure("mc1", "share of questions whose true answer is most likely", "true", "higher", reference=chance),
        Figure("margin", "log P(true answer) − log P(most likely false one), nats", "margin", "higher"),
    )
    note = "TruthfulQA MC1, zero-shot, steered from the last prompt token on."
    return Vertical("truthfulness", len(chosen), left_out, figures, read, note, details={"files": source.files})


def _parse(cells: Mapping[str, Any]) -> tuple[str, list[str]]:
    """A question with its answers. The true answer comes first."""
    question, targets = text_cell(cells, "question"), cells.get("mc1_targets")
    if not isinstance(targets, dict) or not all(isinstance(mark, int) for mark in targets.values()):
        raise BadRow("must be an object of answers, each marked 1 (true) or 0", "mc1_targets")
    if sorted(targets.values())[-2:] != [0, 1] or min(targets.values()) < 0:
        raise BadRow("must mark exactly one answer 1, and at least one other 0", "mc1_targets")
    if not all(answer.strip() for answer in targets):
        raise BadRow("contains an empty answer", "mc1_targets")
    return question, sorted(targets, key=lambda answer: -targets[answer])
