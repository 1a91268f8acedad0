"""How many prompt tokens a step may compute, so that rows which are decoding wait no longer than they should.

Learns what a prompt token and a decoding pass cost from the passes that were run. No torch: numbers only.
"""

from __future__ import annotations

STALL = 1.5  # decoding passes that prompts may take as long as, where no time was set
LEAST = 16  # tokens: fewer would cost a pass each and get nowhere
MEMORY = 0.8  # of what was learnt before, at each new pass


class Pace:
    """`most` bounds the tokens, `stall_s` the seconds; None bounds them by what a decoding pass takes."""

    def __init__(self, most: int, stall_s: float | None = None) -> None:
        self._most = most
        self._stall = stall_s
        self._decoding: float | None = None  # seconds of a pass
        self._token: float | None = None  # seconds of one token of a prompt

    def note_decoding(self, seconds: float) -> None:
        self._decoding = _learnt(self._decoding, seconds)

    def note_prompts(self, tokens: int, seconds: float) -> None:
        self._token = _learnt(self._token, seconds / tokens)

    def tokens(self) -> int:
        """Of prompts, in a step in which other rows decode."""
        stall = self._stall if self._stall is not None or self._decoding is None else STALL * self._decoding
        if stall is None or self._token is None:
            return self._most
        return max(min(LEAST, self._most), int(min(self._most, stall / self._token)))


def _learnt(before: float | None, now: float) -> float:
    return now if before is None else MEMORY * before + (1 - MEMORY) * now
