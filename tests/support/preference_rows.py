"""Rows of preference data, and the files that hold them."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from typing import Any

import pytest

from steering_vectors.data.chat import Message
from steering_vectors.data.sources import load_pairs
from steering_vectors.errors import DataError

Rows = list[dict[str, Any]]
Write = Callable[..., str]
REMEDY = "correct the row, or skip such rows with skip_bad_rows"

PREFERENCE: Rows = [{"prompt": f"q {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(16)]
UNPAIRED: Rows = [{"prompt": f"q {i}", "completion": f"text {i}", "label": i % 2 == 0} for i in range(16)]
CONTRAST: Rows = [{"positive": f"good {i}", "negative": f"bad {i}"} for i in range(16)]


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def messages(*contents: str) -> tuple[Message, ...]:
    return tuple(Message(**turn) for turn in turns(*contents))  # type: ignore[arg-type]


def as_csv(rows: Rows, delimiter: str = ",") -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def as_parquet(rows: Rows) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


def changed(rows: Rows, index: int, **cells: Any) -> Rows:
    """The rows with other cells in one of them; ... removes a cell."""
    row = {key: value for key, value in (rows[index] | cells).items() if value is not ...}
    return [*rows[:index], row, *rows[index + 1 :]]


def error_of(path: str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_pairs(path, **options)
    return str(caught.value)
