"""What the KV of each slot was computed from, and how much of it a new prompt can reuse.

The keys and values of a position follow from the tokens up to it and from how each of these positions was steered. So
the key of a slot is its tokens and its spans of steering, and two keys share what comes before the first token or span
that differs. Keys of different tenants share nothing, or one could find out what another's prompt begins with.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steering_vectors.runtime.slot_cache import Columns

MIN_REUSED_TOKENS = 8  # a copy of fewer costs more than computing them
COMPARED_AT_ONCE = 64  # tokens


@dataclass(slots=True)
class PrefixKey:
    """Tokens, and the spans of steering over them: (from, digest), ascending from 0; "" is the untouched model."""

    ids: list[int] = field(default_factory=list)
    spans: list[tuple[int, str]] = field(default_factory=list)
    tenant: str = ""

    @classmethod
    def of(cls, ids: Sequence[int], steered_from: int | None, digest: str, tenant: str = "") -> PrefixKey:
        key = cls(tenant=tenant)
        key.extend(0, ids, steered_from, digest)
        return key

    def __len__(self) -> int:
        return len(self.ids)

    def extend(self, start: int, ids: Sequence[int], steered_from: int | None, digest: str) -> None:
        """Continue from `start` with tokens that are steered from position `steered_from` on; None: nowhere."""
        self.cut(start)
        end = start + len(ids)
        border = end if steered_from is None else min(max(steered_from, start), end)
        for first, last, name in ((start, border, ""), (border, end, digest)):
            if first < last and (not self.spans or self.spans[-1][1] != name):
                self.spans.append((first, name))
        self.ids += ids

    def cut(self, length: int) -> None:
        """Drop everything after the first `length` positions."""
        del self.ids[length:]
        while self.spans and self.spans[-1][0] >= length:
            self.spans.pop()

    def head(self, length: int) -> PrefixKey:
        """The key of the first `length` positions."""
        return PrefixKey(self.ids[:length], [span for span in self.spans if span[0] < length], self.tenant)

    def shared(self, other: PrefixKey) -> int:
        """How many positions from the start on the two have in common."""
        if self.tenant != other.tenant:
            return 0
        length = _common(self.ids, other.ids)
        end = (length, "")
        for mine, theirs in zip_longest(self.spans, other.spans, fillvalue=end):
            if mine != theirs:
                return min(mine[0], theirs[0], length)
        return length


class PrefixCache:
    """The keys of all slots. Nothing is reused if the runner's state is not KV in columns (`columns` None)."""

    def __init__(self, slots: int, columns: Columns | None) -> None:
        self._columns = columns
        self._keys = [PrefixKey() for _ in range(slots)]
        self._used = [0] * slots  # when, on a clock that ticks at each release
        self._clock = 0

    @property
    def reuses(self) -> bool:
        return self._columns is not None

    def key(self, slot: int) -> PrefixKey:
        return self._keys[slot]

    def record(
        self, slot: int, start: int, ids: Sequence[int], steered_from: int | None, digest: str, tenant: str = ""
    ) -> None:
        """Note that these tokens were computed in a slot, from position `start` on."""
        if self.reuses:
            self._keys[slot].tenant = tenant
            self._keys[slot].extend(start, ids, steered_from, digest)

    def forget(self, slot: int) -> None:
        self._keys[slot] = PrefixKey()

    def release(self, slot: int, *, continued: bool) -> None:
        """Keep what a slot holds until the slot is needed; if it is likely to be continued, move it to another slot
        then."""
        self._clock += 1
        self._used[slot] = self._clock if continued else 0

    def longest(self, wanted: PrefixKey) -> tuple[int, int]:
        """The slot that shares the longest prefix, and its length; the latest used among equals."""
        if not self.reuses or not len(wanted):
            return 0, 0
        shared = [key.shared(wanted) for key in self._keys]
        slot = max(range(len(shared)), key=lambda slot: (shared[slot], self._used[slot]))
        return slot, shared[slot]

    def kept(self, slots: Collection[int]) -> int:
        """The number of positions that these slots hold."""
        return sum(len(self._keys[slot]) for slot in slots)

    def copy_prefix(self, slot: int, source: int, length: int) -> None:
        """Let a slot hold the first `length` positions of another slot, or of its own."""
        if source != slot:
            self._move(source, slot, length)
            if 2 * length >= len(self._keys[source]):
                self._used[source] = 0  # the text goes on here and is not needed there
        self._keys[slot].cut(length)

    def evict(self, slot: int, free: Collection[int], wanted: PrefixKey) -> None:
        """Save the KV of a slot that is about to be taken: move it to the least valuable free slot; swap if a free slot
        already holds the prefix that is wanted here."""
        held = self._keys[slot]
        source, shared = self.longest(wanted)
        continued = 2 * shared >= len(self._keys[source])
        if not self.reuses or len(held) < MIN_REUSED_TOKENS or (continued and source == slot):
            return
        if continued and source in free:
            self._swap(slot, source)
            return
        target = min((other for other in free if other not in (slot, source)), key=self._value, default=slot)
        if target != slot and self._value(target)[0] < self._value(slot)[0]:
            self._move(slot, target, len(held))
            self._used[target] = self._used[slot]

    def _value(self, slot: int) -> tuple[int, int]:
        """What a slot's KV is worth keeping for: how lately it was used; nothing if it is too short to be reused."""
        return (self._used[slot] if len(self._keys[slot]) >= MIN_REUSED_TOKENS else 0), -slot

    def _move(self, source: int, target: int, length: int) -> None:
        assert self._columns is not None
        self.forget(target)  # a copy that fails may leave any keys and values there
        self._columns.copy(source, target, length)
        self._keys[target] = self._keys[source].head(length)

    def _swap(self, one: int, other: int) -> None:
        assert self._columns is not None
        keys = self._keys[one], self._keys[other]
        self.forget(one)  # a swap that fails may leave any keys and values in both
        self.forget(other)
        self._columns.swap(one, other, max(map(len, keys)))
        self._keys[other], self._keys[one] = keys
        self._used[one], self._used[other] = self._used[other], self._used[one]


def _common(one: list[int], other: list[int]) -> int:
    """The length of the longest common prefix."""
    length = min(len(one), len(other))
    for start in range(0, length, COMPARED_AT_ONCE):
        end = min(start + COMPARED_AT_ONCE, length)
        if one[start:end] != other[start:end]:
            return next(place for place in range(start, end) if one[place] != other[place])
    return length
