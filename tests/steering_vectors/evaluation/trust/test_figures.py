"""Changes of figures, their intervals and their verdicts."""

from __future__ import annotations

import numpy as np
import pytest

from steering_vectors.evaluation.trust.figures import Figure, compare, verdict


def test_a_change_is_paired_by_row() -> None:
    """The rows differ by much more than the change, which is nearly the same in all of them."""
    generator = np.random.default_rng(0)
    base = generator.normal(size=200) * 10
    seen = base + 0.5 + generator.normal(size=200) * 0.1
    found = compare(Figure("x", "x", "x", "higher"), {0.0: {"x": base}, 1.0: {"x": seen}})[1.0]
    assert found["value"] == pytest.approx(seen.mean())
    assert found["delta"] == pytest.approx((seen - base).mean())
    half = 1.96 * (seen - base).std() / np.sqrt(200)
    assert found["delta_95"] == pytest.approx((found["delta"] - half, found["delta"] + half), abs=0.005)
    assert found["value_95"][1] - found["value_95"][0] > 2
    assert found["change"] == "better"


def test_a_figure_reads_its_rows_alone() -> None:
    values, base = np.arange(8.0), np.zeros(8)
    figure = Figure("x", "x", "x", "lower", rows=np.array([6, 7]))
    series = {0.0: {"x": base}, 1.0: {"x": values}}
    assert compare(figure, series)[1.0]["value"] == 6.5
    assert compare(figure, series, np.array([1]))[1.0]["delta"] == 1


@pytest.mark.parametrize(
    ("aim", "old", "new", "interval", "word"),
    [
        ("higher", 0.2, 0.4, (0.1, 0.3), "better"),
        ("lower", 0.2, 0.4, (0.1, 0.3), "worse"),
        ("lower", 0.4, 0.2, (-0.3, -0.1), "better"),
        ("higher", 0.2, 0.4, (-0.1, 0.3), "no change"),
        ("higher", 0.2, 0.4, (0.0, 0.3), "no change"),
        ("half", 0.6, 0.55, (-0.06, -0.04), "better"),
        ("half", 0.4, 0.3, (-0.12, -0.08), "worse"),
        ("half", 0.6, 0.45, (-0.2, -0.1), "other side"),
    ],
)
def test_verdicts(aim: str, old: float, new: float, interval: tuple[float, float], word: str) -> None:
    assert verdict(aim, old, new, interval) == word  # type: ignore[arg-type]
