"""Verticals and their figures: the readings of each row, the statistics over rows, and their changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from steering_vectors.measures.controls import interval, resample
from steering_vectors.measures.results import Comparison, VerticalDetails
from steering_vectors.measures.steered_model import SteeredModel

Aim = Literal["higher", "lower", "half"]
Columns = Mapping[str, np.ndarray]
"""The readings of every row, by name: float64 `[rows]` each."""
Statistic = Callable[[np.ndarray, np.ndarray], float]
"""A function of a column and of row indices that returns one number."""

NO_CHANGE = "no change"


def mean(values: np.ndarray, rows: np.ndarray) -> float:
    return float(values[rows].mean())


@dataclass(frozen=True, slots=True, eq=False)
class Figure:
    """A statistic of one column over `rows` (all if None).

    `text` describes it with its unit, `aim` says which direction is better, `reference` is the value of a model without
    skill or bias.
    """

    name: str
    text: str
    column: str
    aim: Aim
    statistic: Statistic = mean
    rows: np.ndarray | None = None
    reference: float | None = None

    def rows_of(self, seen: Columns) -> np.ndarray:
        return np.arange(len(seen[self.column])) if self.rows is None else self.rows

    def value(self, seen: Columns) -> float:
        return self.statistic(seen[self.column], self.rows_of(seen))


@dataclass(frozen=True, slots=True, eq=False)
class Vertical:
    """The rows of one vertical, encoded for one model. The first figure is the main one; `parts` are groups of rows."""

    name: str
    rows: int
    left_out: int
    figures: tuple[Figure, ...]
    read: Callable[[SteeredModel], Columns]  # under the steering that is set
    note: str
    parts: Mapping[str, np.ndarray] = field(default_factory=dict)
    details: VerticalDetails = field(default_factory=VerticalDetails)
    remarks: Callable[[Columns], Sequence[str]] = lambda _: ()  # on the readings at strength 0


def compare(figure: Figure, series: Mapping[float, Columns], rows: np.ndarray | None = None) -> dict[float, Comparison]:
    """A figure's value and its change from strength 0, by strength, with 95 % bootstrap intervals over rows.

    The change is paired: both strengths are resampled together, row by row. `rows` restricts it to a group of rows.
    """
    chosen = figure.rows_of(series[0.0]) if rows is None else rows
    base, base_draws = _estimated(figure, series[0.0], chosen)
    found: dict[float, Comparison] = {}
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
    """The statistic, and its values over resampled rows."""
    values = seen[figure.column]
    return figure.statistic(values, rows), resample(lambda drawn: figure.statistic(values, rows[drawn]), len(rows))


def verdict(aim: Aim, old: float, new: float, change: tuple[float, float]) -> str:
    """`no change` if the interval of the change contains 0, else `better` or `worse`. For aim `half` it is `other side`
    if the value crosses 0.5."""
    if change[0] <= 0 <= change[1]:
        return NO_CHANGE
    if aim == "half":
        if (old - 0.5) * (new - 0.5) < 0:
            return "other side"
        return "better" if abs(new - 0.5) < abs(old - 0.5) else "worse"
    return "better" if (new > old) == (aim == "higher") else "worse"
