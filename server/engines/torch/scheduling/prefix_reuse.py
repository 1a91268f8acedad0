"""What the keys and values of each slot were made from, and how much of that a new prompt shares.

Keys and values of a position follow from the tokens up to it and from what was done to the residual stream at each of
these positions. So a slot's trace is its tokens and its runs of steering, and two traces share what comes before the
first token or run that differs. Owns the traces and keeps them in step with the copies that it asks for. No torch:
numbers and lists only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steering_vectors.runtime.slot_cache import Columns

LEAST = 8  # tokens: a copy of fewer costs more than computing them
CHUNK = 64


@dataclass(slots=True)
class Trace:
    """Tokens, and the runs of steering over them: (from, digest), ascending from 0; "" is the untouched model."""

    ids: list[int] = field(default_factory=list)
    runs: list[tuple[int, str]] = field(default_factory=list)

    @classmethod
    def of(cls, ids: Sequence[int], steered_from: int | None, digest: str) -> Trace:
        trace = cls()
        trace.extend(0, ids, steered_from, digest)
        return trace

    def __len__(self) -> int:
        return len(self.ids)

    def extend(self, start: int, ids: Sequence[int], steered_from: int | None, digest: str) -> None:
        """Go on from `start` with tokens that are steered from position `steered_from` on; None: nowhere."""
        self.cut(start)
        end = start + len(ids)
        border = end if steered_from is None else min(max(steered_from, start), end)
        for first, last, name in ((start, border, ""), (border, end, digest)):
            if first < last and (not self.runs or self.runs[-1][1] != name):
                self.runs.append((first, name))
        self.ids += ids

    def cut(self, length: int) -> None:
        """Forget what comes after so many positions."""
        del self.ids[length:]
        while self.runs and self.runs[-1][0] >= length:
            self.runs.pop()

    def head(self, length: int) -> Trace:
        return Trace(self.ids[:length], [run for run in self.runs if run[0] < length])

    def shared(self, other: Trace) -> int:
        """How many positions from the start on the two have in common."""
        length = _common(self.ids, other.ids)
        end = (length, "")
        for mine, theirs in zip_longest(self.runs, other.runs, fillvalue=end):
            if mine != theirs:
                return min(mine[0], theirs[0], length)
        return length


class Prefixes:
    """The traces of all slots. Where state is not keys and values in columns, None, nothing is ever shared."""

    def __init__(self, slots: int, columns: Columns | None) -> None:
        self._columns = columns
        self._traces = [Trace() for _ in range(slots)]
        self._used = [0] * slots  # when, on a clock that ticks at each use
        self._clock = 0

    @property
    def shares(self) -> bool:
        return self._columns is not None

    def trace(self, slot: int) -> Trace:
        return self._traces[slot]

    def note(self, slot: int, start: int, ids: Sequence[int], steered_from: int | None, digest: str) -> None:
        """These tokens were computed in a slot, from position `start` on."""
        if self.shares:
            self._traces[slot].extend(start, ids, steered_from, digest)

    def forget(self, slot: int) -> None:
        self._traces[slot] = Trace()

    def release(self, slot: int, *, continued: bool = True) -> None:
        """Nothing runs in a slot any more; what it holds is kept until the slot is needed, and longer than that, in
        another one, if it is likely to be continued."""
        self._clock += 1
        self._used[slot] = self._clock if continued else 0

    def longest(self, wanted: Trace) -> tuple[int, int]:
        """The slot that shares most with what is wanted, and how much; the latest used among equals."""
        if not self.shares or not len(wanted):
            return 0, 0
        shared = [trace.shared(wanted) for trace in self._traces]
        slot = max(range(len(shared)), key=lambda slot: (shared[slot], self._used[slot]))
        return slot, shared[slot]

    def adopt(self, slot: int, source: int, length: int) -> None:
        """Let a slot hold the first so many positions of another's (or of its own)."""
        if source != slot:
            self._move(source, slot, length)
            if 2 * length >= len(self._traces[source]):
                self._used[source] = 0  # what goes on here is not needed there
        self._traces[slot].cut(length)

    def vacate(self, slot: int, free: Collection[int], wanted: Trace) -> None:
        """Before a slot is taken: what it holds goes to the free one that is missed least, if it is worth more; best of
        all to the one that holds what is wanted, which comes here."""
        held = self._traces[slot]
        source, shared = self.longest(wanted)
        continued = 2 * shared >= len(self._traces[source])
        if not self.shares or len(held) < LEAST or (continued and source == slot):
            return
        if continued and source in free:
            self._swap(slot, source)
            return
        target = min((other for other in free if other not in (slot, source)), key=self._worth, default=slot)
        if target != slot and self._worth(target)[0] < self._worth(slot)[0]:
            self._move(slot, target, len(held))
            self._used[target] = self._used[slot]

    def _worth(self, slot: int) -> tuple[int, int]:
        return (self._used[slot] if len(self._traces[slot]) >= LEAST else 0), -slot

    def _move(self, source: int, target: int, length: int) -> None:
        assert self._columns is not None
        self._columns.copy(source, target, length)
        self._traces[target] = self._traces[source].head(length)

    def _swap(self, one: int, other: int) -> None:
        assert self._columns is not None
        self._columns.swap(one, other, max(len(self._traces[one]), len(self._traces[other])))
        self._traces[one], self._traces[other] = self._traces[other], self._traces[one]
        self._used[one], self._used[other] = self._used[other], self._used[one]


def _common(one: list[int], other: list[int]) -> int:
    """The length of the longest common prefix."""
    length = min(len(one), len(other))
    for start in range(0, length, CHUNK):
        end = min(start + CHUNK, length)
        if one[start:end] != other[start:end]:
            return next(place for place in range(start, end) if one[place] != other[place])
    return length
