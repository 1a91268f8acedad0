"""How much a server has to do: the generations that run or wait, whose they are, and how long one takes."""

from __future__ import annotations

import math
import threading
from collections import Counter

from server.engines.errors import Overloaded
from server.engines.protocol import Finished

SMOOTHING = 0.9  # weight of what was measured before
MIN_RETRY_SECONDS = 1
MAX_RETRY_SECONDS = 60  # OpenAI's clients do not heed longer ones


class Load:
    """Counts generations from before their prompts are tokenised until they end. May be used from any thread.

    `capacity` of them may run and wait at once, `slots` of which run. One request, and one tenant, may have `most` of
    them: all slots, and the given share of the queue. Without keys, all requests are of the tenant "", who may have
    them all.
    """

    def __init__(self, slots: int, capacity: int, share: float) -> None:
        self._slots = slots
        self._capacity = capacity
        self.most = slots + math.ceil(share * (capacity - slots))
        self._tenants: Counter[str] = Counter()
        self._total = 0
        self._seconds: float | None = None  # for which a generation has a slot
        self._lock = threading.Lock()

    @property
    def total(self) -> int:
        return self._total

    def check_room(self, tenant: str, count: int = 1) -> None:
        """Raise Overloaded if there is no room for so many more."""
        if self._total + count > self._capacity:
            raise Overloaded(f"{self._total} generations are running or waiting already: try again later")
        if tenant and self._tenants[tenant] + count > self.most:
            raise Overloaded(
                f"{self._tenants[tenant]} generations of this key are running or waiting already, of at most "
                f"{self.most}: try again later"
            )

    def take(self, tenant: str, count: int) -> Place:
        """Make room for generations. Raises Overloaded."""
        with self._lock:
            self.check_room(tenant, count)
            self._total += count
            self._tenants[tenant] += count
        return Place(self, tenant, count)

    def free(self, tenant: str, count: int) -> None:
        with self._lock:
            self._total -= count
            self._tenants -= Counter({tenant: count})  # drops it at 0

    def note(self, seconds: float) -> None:
        """A generation has had a slot for so long."""
        before = self._seconds
        self._seconds = seconds if before is None else SMOOTHING * before + (1 - SMOOTHING) * seconds

    def retry_after(self) -> int:
        """The seconds after which all that wait now will have a slot, as far as the latest generations tell."""
        waiting = max(0, self._total - self._slots) + 1
        seconds = math.ceil(waiting * (self._seconds or 0.0) / self._slots)
        return min(max(seconds, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)


class Place:
    """The room that the generations of one request take."""

    def __init__(self, load: Load, tenant: str, count: int) -> None:
        self._load = load
        self._tenant = tenant
        self._left = count

    def finished(self, event: Finished) -> None:
        """One of them has ended."""
        times = event.times
        if times is not None and (seconds := times.prefill + times.decode) > 0:
            self._load.note(seconds)
        self._free(1)

    def close(self) -> None:
        """All of them have ended."""
        self._free(self._left)

    def _free(self, count: int) -> None:
        count = min(count, self._left)
        self._left -= count
        self._load.free(self._tenant, count)
