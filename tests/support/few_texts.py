"""Calibrations of a few texts, for tests that do not measure how well a unit holds for others."""

from __future__ import annotations

import pytest

from steering_vectors.fitting import calibration


def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small numbers of texts, so that a calibration takes a moment."""
    for name, value in {"ROWS": 10, "ROUGH_ROWS": 4, "TEXTS": 5}.items():
        monkeypatch.setattr(calibration, name, value)
