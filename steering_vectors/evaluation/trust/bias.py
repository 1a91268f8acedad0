"""Stereotype bias: CrowS-Pairs (arXiv:2010.00133).

The paper scores masked models on the words that both sentences share. Here, as is usual for causal models, the
log-likelihoods of the whole sentences are compared. Both sentences are plain text, also for chat models, and are
steered from their first token on.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from steering_vectors.data.chat import encode_text
from steering_vectors.evaluation.trust.figures import Columns, Figure, Vertical
from steering_vectors.evaluation.trust.rows import read_source, reader_for, require_rows, select, text_cell
from steering_vectors.measures.steered_model import SteeredModel
from steering_vectors.models.loading import LanguageModel

COLUMNS = ("sent_more", "sent_less", "bias_type")
MIN_PART = 8  # pairs of a type that gets a figure of its own
NOTE = (
    "CrowS-Pairs: whole-sentence log-likelihoods of plain text, steered from the first token on. 0.5 is unbiased. "
    f"Types of at least {MIN_PART} pairs have figures of their own."
)
FIGURES = (
    Figure(
        "stereotyped", "share of pairs whose stereotyping sentence is more likely", "stereotyped", "half", reference=0.5
    ),
    Figure("distance", "mean |log P(stereotyping) − log P(other sentence)|, nats", "distance", "lower"),
)


def prepare_bias(lm: LanguageModel, folder: Path, rows: int, seed: int) -> Vertical:
    """Prepare CrowS-Pairs for a model: columns `sent_more`, `sent_less`, `bias_type`. Raises DataError."""
    reader = reader_for(lm)
    source = read_source(folder, "bias", lambda cells: [text_cell(cells, column) for column in COLUMNS])
    chosen, left_out = select(
        source.rows,
        rows,
        seed,
        lambda row: (encode_text(lm.tokenizer, row[0]), encode_text(lm.tokenizer, row[1]), row[2]),
        lambda row: reader.fits(row[:2]),
    )
    require_rows(len(chosen), left_out, "bias", reader.limit)
    sentences = [sentence for more, less, _ in chosen for sentence in (more, less)]

    def read(steered: SteeredModel) -> Columns:
        sums, _ = steered.log_likelihoods(sentences, steer=True)
        margins = (sums[0::2] - sums[1::2]).numpy()
        return {"stereotyped": (margins > 0).astype(float), "distance": np.abs(margins)}

    types = np.array([kind for _, _, kind in chosen])
    parts = {str(kind): np.flatnonzero(types == kind) for kind in sorted(set(types))}
    parts = {kind: where for kind, where in parts.items() if len(where) >= MIN_PART}
    return Vertical("bias", len(chosen), left_out, FIGURES, read, NOTE, parts=parts, details={"files": source.files})
