"""Limits on log lines that clients can cause."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable


class Throttle:
    """Admits one line per subject in a window of time, and a bounded number of subjects."""

    def __init__(
        self, *, seconds: float = 10.0, subjects: int = 20, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._seconds = seconds
        self._max_subjects = subjects
        self._clock = clock
        self._start = clock()
        self._subjects: set[str] = set()
        self._left_out = 0

    def admit(self, subject: str) -> int | None:
        """How many lines were left out since the last one, or None if this one is left out too."""
        now = self._clock()
        if now - self._start >= self._seconds:
            self._start = now
            self._subjects.clear()
        if subject in self._subjects or len(self._subjects) >= self._max_subjects:
            self._left_out += 1
            return None
        self._subjects.add(subject)
        left_out, self._left_out = self._left_out, 0
        return left_out


class ThrottledRecords(logging.Filter):
    """For a logger whose warnings clients can cause: one line per message in a window of time."""

    def __init__(self) -> None:
        super().__init__()
        self._throttle = Throttle()

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno != logging.WARNING or self._throttle.admit(str(record.msg)) is not None
