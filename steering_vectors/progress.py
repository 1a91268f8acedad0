"""How long work reports its progress, and the lines that show it without a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

LINE_SECONDS = 10.0  # between two lines


class Progress(Protocol):
    """Told the stage of long work, how much is done of how much, and what there is to say of it."""

    def __call__(self, stage: str, done: int, total: int, /, detail: str = "") -> None: ...


class ProgressLines:
    """Progress as lines of text: one when a stage begins, one at its end, and one every ten seconds between.

        tune good: 12/75, 1:05 so far, 5:40 left, loss 1.873

    The time left assumes that the rest of the stage goes on at its mean speed so far. It is not shown while nothing is
    done. `names` has other names for some stages, `clock` gives seconds.
    """

    def __init__(
        self,
        write: Callable[[str], object],
        names: Mapping[str, str] = MappingProxyType({}),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write, self._names, self._clock = write, names, clock
        self._begins: dict[str, tuple[float, int]] = {}  # when each stage began, and how much was done then
        self._shown: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int, /, detail: str = "") -> None:
        now = self._clock()
        began, before = self._begins.setdefault(stage, (now, done))
        last = self._shown.get(stage)
        if last is not None and done < total and now - last < LINE_SECONDS:
            return
        self._shown[stage] = now
        parts = [f"{done}/{total}", f"{_minutes(now - began)} so far"]
        if before < done < total:
            parts.append(f"{_minutes((now - began) * (total - done) / (done - before))} left")
        self._write(f"{self._names.get(stage, stage)}: {', '.join([*parts, detail] if detail else parts)}")


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
