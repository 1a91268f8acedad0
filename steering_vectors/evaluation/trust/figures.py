"""Figures over rows, their change against strength 0, and a word for it.

Owns what a vertical is to the suite: rows that can be read under steering, and figures over what was read. Knows
nothing of models' inputs or of files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from steering_vectors.measures.controls import interval, resample
from steering_vectors.measures.steered_model import SteeredModel

Aim = Literal["higher", "lower", "half"]
Columns = Mapping[str, np.ndarray]
"""What was read of every row, by name: float64 `[rows]` each."""
Statistic = Callable[[np.ndarray, np.ndarray], float]
"""(a column, indices of rows) → one number."""

NO_CHANGE = "no change"


def mean(values: np.ndarray, rows: np.ndarray) -> float:
    return float(values[rows].mean())


@dataclass(frozen=True, slots=True, eq=False)
class Figure:
    """A statistic of one column over some rows (all, if None); `aim` says which way is better, where it matters.

    `text` says what it is, with its unit; `reference` is what a model without any skill or leaning scores.
    """

    name: str
    text: str
    column: str
    aim: Aim
    statistic: Statistic = mean
    rows: np.ndarray | None = None
    reference: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Vertical:
    """Rows of one vertical as one model reads them. The first figure is the main one; `parts` are groups of rows."""

    name: str
    rows: int
    left_out: int
    figures: tuple[Figure, ...]
    read: Callable[[SteeredModel], Columns]  # under the mix that is written
    note: str
    parts: Mapping[str, np.ndarray] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    remarks: Callable[[Columns], Sequence[str]] = lambda _: ()  # on what was read at strength 0


def compare(
    figure: Figure, series: Mapping[float, Columns], rows: np.ndarray | None = None
) -> dict[float, dict[str, Any]]:
    """By strength, a figure's value and its change against strength 0, with 95 % bootstrap intervals over rows.

    The change is paired: both strengths are resampled together, row by row. `rows` restricts to a group of rows.
    """
    chosen = rows_of(figure, len(series[0.0][figure.column])) if rows is None else rows
    base, base_draws = _estimated(figure, series[0.0], chosen)
    found = {}
    for strength, seen in series.items():
        value, draws = _estimated(figure, seen, chosen) if strength else (base, base_draws)
        change = interval(draws - base_draws)
        found[strength] = {
            "value": value,
            "value_95": interval(draws),
            "delta": value - base,
            "delta_95": change,
            "change": verdict(figure.aim, base, value, change),
        }
    return found


def _estimated(figure: Figure, seen: Columns, rows: np.ndarray) -> tuple[float, np.ndarray]:
    """The statistic, and what it is of resampled rows."""
    values = seen[figure.column]
    return figure.statistic(values, rows), resample(lambda drawn: figure.statistic(values, rows[drawn]), len(rows))


def rows_of(figure: Figure, count: int) -> np.ndarray:
    return np.arange(count) if figure.rows is None else figure.rows


def verdict(aim: Aim, old: float, new: float, change: tuple[float, float]) -> str:
    """`no change` if the interval of the change holds 0, else `better`, `worse`, or for a share whose ideal is a half
    also `other side`."""
    if change[0] <= 0 <= change[1]:
        return NO_CHANGE
    if aim == "half":
        if (old - 0.5) * (new - 0.5) < 0:
            return "other side"
        return "better" if abs(new - 0.5) < abs(old - 0.5) else "worse"
    return "better" if (new > old) == (aim == "higher") else "worse"
