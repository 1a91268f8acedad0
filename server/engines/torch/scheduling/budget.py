"""How many prompt tokens a step may compute, so that rows which are decoding do not wait too long.

The cost of a prompt token and of a decoding pass is learnt from the passes that were run.
"""

from __future__ import annotations

STALL_PASSES = 1.5  # decoding passes that prompts may take as long as, where no time was set
MIN_BUDGET = 16  # tokens: fewer would cost a pass each and get nowhere
SMOOTHING = 0.8  # weight of the estimate so far at each new pass


class PrefillBudget:
    """`limit` bounds the tokens, `stall_s` the seconds; None bounds them by the time of a decoding pass."""

    def __init__(self, limit: int, stall_s: float | None = None) -> None:
        self._limit = limit
        self._stall = stall_s
        self._decoding: float | None = None  # seconds of a pass
        self._token: float | None = None  # seconds of one token of a prompt

    def note_decoding(self, seconds: float) -> None:
        self._decoding = _smoothed(self._decoding, seconds)

    def note_prompts(self, tokens: int, seconds: float) -> None:
        self._token = _smoothed(self._token, seconds / tokens)

    def tokens(self) -> int:
        """The prompt tokens of a step in which other rows decode."""
        stall = self._stall
        if stall is None and self._decoding is not None:
            stall = STALL_PASSES * self._decoding
        if stall is None or self._token is None:
            return self._limit
        return max(min(MIN_BUDGET, self._limit), int(min(self._limit, stall / self._token)))


def _smoothed(before: float | None, now: float) -> float:
    return now if before is None else SMOOTHING * before + (1 - SMOOTHING) * now
