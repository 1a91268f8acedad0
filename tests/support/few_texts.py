"""Calibrations of a few short texts, for tests that do not measure how well a unit holds for others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from steering_vectors.fitting import calibration

LONG_TOKENS, LONG_TEXTS = 32, 4


def few_texts(monkeypatch: pytest.MonkeyPatch, rows: int = 10, *, short: bool = False) -> None:
    """Small numbers of texts, so that a calibration takes a moment. If they are `short`, long texts have few tokens as
    well, whatever the settings say; those that ask for less hold."""
    for name, value in {"ROWS": rows, "ROUGH_ROWS": 4, "TEXTS": 5}.items():
        monkeypatch.setattr(calibration, name, value)
    if not short:
        return
    checked = calibration._checked_on_long_texts

    def shorter(*given: Any) -> Any:
        *before, settings, progress = given
        fewer = replace(
            settings,
            text_tokens=min(settings.text_tokens, LONG_TOKENS),
            text_count=min(settings.text_count, LONG_TEXTS),
        )
        return checked(*before, fewer, progress)

    monkeypatch.setattr(calibration, "_checked_on_long_texts", shorter)
