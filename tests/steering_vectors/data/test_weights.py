"""The column of weights: how much each row counts, and what keeps it with its row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from steering_vectors.data.corpus import encode_corpus
from steering_vectors.data.preferences import Preferences
from steering_vectors.data.sources import load_pairs
from steering_vectors.errors import DataError
from tests.support.preference_rows import PREFERENCE, UNPAIRED, Rows, Write, as_csv, as_parquet, error_of
from tests.support.tiny_tokenizers import tiny_tokenizer

WEIGHTS = tuple(float(1 + number % 3) for number in range(16))


def weighed(rows: Rows, column: str = "weight") -> Rows:
    return [row | {column: weight} for row, weight in zip(rows, WEIGHTS, strict=False)]


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_a_column_that_is_named_is_read(write: Write, form: str) -> None:
    rows = weighed(PREFERENCE[:16], "votes")
    written: Any = {"jsonl": rows, "csv": as_csv(rows), "parquet": as_parquet(rows)}[form]
    pairs = load_pairs(write(written, f"data.{form}"), columns={"weight": "votes"})
    assert pairs.weights == WEIGHTS
    assert pairs.weighted
    assert pairs.ignored_columns == ()
    assert pairs.effective_rows == pytest.approx(sum(WEIGHTS) ** 2 / sum(one**2 for one in WEIGHTS))


def test_a_column_that_is_not_named_says_nothing(write: Write) -> None:
    pairs = load_pairs(write(weighed(PREFERENCE[:16])))
    assert (pairs.weights, pairs.ignored_columns, pairs.effective_rows) == ((), ("weight",), 16)
    assert pairs.side_weights() is None


def test_weights_of_unpaired_rows_go_with_their_side(write: Write) -> None:
    rows = [row | {"weight": 2.0 if row["label"] else 0.5} for row in UNPAIRED]
    pairs = load_pairs(write(rows), columns={"weight": "weight"})
    assert pairs.side_weights() == ([2.0] * len(pairs.positives), [0.5] * len(pairs.negatives))


@pytest.mark.parametrize("weight", [0, -1, "x", None, True, [1]])
def test_a_weight_that_is_no_positive_number_names_its_row(write: Write, weight: Any) -> None:
    rows = weighed(PREFERENCE[:16])
    rows[3]["weight"] = weight
    path = write(rows)
    message = error_of(path, columns={"weight": "weight"})
    assert "line 4, field 'weight': it must be a positive number" in message


def test_weights_stay_with_their_rows(write: Write) -> None:
    pairs = load_pairs(write(weighed(PREFERENCE[:16])), columns={"weight": "weight"})
    train, heldout = pairs.split(0.3, 1)
    of_row = dict(zip(pairs.items(), WEIGHTS, strict=True))
    for part in (train, heldout):
        assert part.weights == tuple(of_row[item] for item in part.items())
    assert encode_corpus(tiny_tokenizer(), pairs, limit=None).pairs.weights == WEIGHTS


@pytest.mark.parametrize("weights", [(1.0,) * 3, (1.0,) * 15 + (0.0,), (1.0,) * 15 + (float("nan"),)])
def test_weights_made_in_python_are_checked(write: Write, weights: tuple[float, ...]) -> None:
    pairs = load_pairs(write(PREFERENCE[:16]))
    with pytest.raises(DataError, match="weights"):
        replace(pairs, weights=weights)
    assert isinstance(replace(pairs, weights=(2.0,) * 16), Preferences)
    assert not replace(pairs, weights=(2.0,) * 16).weighted
