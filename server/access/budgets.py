"""What each key may use: requests and generated tokens per minute, and requests at once.

The `limits` library counts the requests and tokens of a minute, in this process or in Redis. A minute begins with the
first request in it. Tokens are counted when they are generated: a request is admitted as long as the budget of the
minute is not used up. Requests at once are counted in this process.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import FixedWindowRateLimiter
from limits.errors import ConfigurationError as UnusableStorage
from limits.errors import StorageError
from limits.storage import storage_from_string

from server.access.keys import Key
from server.http.throttle import Throttle
from server.settings import ConfigurationError, Settings

logger = logging.getLogger(__name__)

T = TypeVar("T")
Counted = Literal["requests", "tokens"]

MEMORY = "memory://"
NAMESPACE = "trimtab"
REDIS_SECONDS = 1  # how long to wait for Redis
RETRY_SECONDS = 5.0  # after which Redis is asked again when it did not answer
CLOCK_STEP = 5.0  # seconds by which the wall clock may differ from the other one before it counts as set anew


@dataclass(frozen=True, slots=True)
class Exceeded:
    """Which budget a request exceeds, and after how many seconds it may be sent again."""

    message: str
    retry_after: int


class Budgets:
    """The budgets of all keys. Where a key has none of its own, that of the settings holds; None is no limit."""

    def __init__(self, settings: Settings, retry_after: Callable[[], int] = lambda: 1) -> None:
        """`retry_after` says when a request that met too many others may be sent again, in seconds. Raises
        ConfigurationError if the storage is not usable."""
        self._retry_after = retry_after
        self._settings = settings
        self._here = FixedWindowRateLimiter(MemoryStorage())
        self._shared = None if settings.limits_storage == MEMORY else _in_redis(settings.limits_storage)
        self._running: Counter[str] = Counter()  # by digest
        self._charging: set[asyncio.Task[bool]] = set()
        self._throttle = Throttle()
        self._offset = _clock_offset()
        self._silent = False  # whether Redis did not answer when it was asked last
        self._ask_again = 0.0

    @asynccontextmanager
    async def admit(self, key: Key, *, generates: bool) -> AsyncIterator[Exceeded | None]:
        """Count a request for as long as the context lasts. Yields the budget that it exceeds, if any. A request that
        generates needs a token of its minute to be left."""
        at_once = self._limit(key, "concurrent_requests")
        if at_once is not None and self._running[key.sha256] >= at_once:
            message = f"the key {key.name!r} may run {at_once} requests at once: wait for one of them to end"
            yield Exceeded(message, self._retry_after())
            return
        self._running[key.sha256] += 1
        try:
            yield await self._exceeded(key, generates)
        finally:
            self._running -= Counter({key.sha256: 1})  # drops it at 0

    def charge(self, key: Key, tokens: int) -> None:
        """Count generated tokens, without waiting."""
        limit = self._limit(key, "tokens_per_minute")
        if limit is not None and tokens:
            task = asyncio.create_task(self._count("tokens", key, limit, tokens), name="trimtab-charge")
            self._charging.add(task)
            task.add_done_callback(self._charging.discard)

    async def close(self) -> None:
        """Finish counting, and close the connections to Redis."""
        await asyncio.gather(*self._charging, return_exceptions=True)
        if self._shared is not None and isinstance(self._shared.storage, RedisStorage):
            await self._shared.storage.bridge.get_connection().aclose()  # type: ignore[attr-defined]

    async def _exceeded(self, key: Key, generates: bool) -> Exceeded | None:
        tokens = self._limit(key, "tokens_per_minute")
        if generates and tokens is not None and not await self._is_left("tokens", key, tokens):
            return await self._used_up("tokens", key, tokens)
        requests = self._limit(key, "requests_per_minute")
        if requests is not None and not await self._count("requests", key, requests, 1):
            return await self._used_up("requests", key, requests)
        return None

    async def _used_up(self, counted: Counted, key: Key, limit: int) -> Exceeded:
        window = await self._ask(lambda limiter: limiter.get_window_stats(_item(limit), counted, key.sha256))
        seconds = min(60, max(1, math.ceil(window.reset_time - time.time())))
        return Exceeded(
            f"the key {key.name!r} has used up its {limit} {counted} per minute: try again in {seconds} s", seconds
        )

    async def _is_left(self, counted: Counted, key: Key, limit: int) -> bool:
        return await self._ask(lambda limiter: limiter.test(_item(limit), counted, key.sha256))

    async def _count(self, counted: Counted, key: Key, limit: int, cost: int) -> bool:
        """Count, also beyond the limit. Returns whether the limit is kept."""
        return await self._ask(lambda limiter: limiter.hit(_item(limit), counted, key.sha256, cost=cost))

    async def _ask(self, question: Callable[[FixedWindowRateLimiter], Awaitable[T]]) -> T:
        """Ask the storage. While Redis does not answer, this process counts for itself, and one request in
        `RETRY_SECONDS` waits to find out whether it does again."""
        if self._shared is not None and time.monotonic() >= self._ask_again:
            if self._silent:
                self._ask_again = time.monotonic() + RETRY_SECONDS
            try:
                answer = await question(self._shared)
            except StorageError as error:
                self._silent, self._ask_again = True, time.monotonic() + RETRY_SECONDS
                if self._throttle.admit("storage") is not None:
                    logger.warning("the storage of limits does not answer, so this process counts alone: %s", error)
            else:
                self._silent, self._ask_again = False, 0.0
                return answer
        if abs(_clock_offset() - self._offset) > CLOCK_STEP:  # the library's minutes would end hours too late
            self._offset = _clock_offset()
            await self._here.storage.reset()
        return await question(self._here)

    def _limit(self, key: Key, name: str) -> int | None:
        own: int | None = getattr(key, name)
        default: int | None = getattr(self._settings, name)
        return default if own is None else own


def _clock_offset() -> float:
    """Changes when the wall clock is set."""
    return time.time() - time.monotonic()


def _item(limit: int) -> RateLimitItemPerMinute:
    return RateLimitItemPerMinute(limit, namespace=NAMESPACE)


def _in_redis(url: str) -> FixedWindowRateLimiter:
    try:
        storage = storage_from_string(
            f"async+{url}",
            implementation="redispy",
            wrap_exceptions=True,
            socket_timeout=REDIS_SECONDS,
            socket_connect_timeout=REDIS_SECONDS,
        )
    except UnusableStorage as error:
        raise ConfigurationError(
            f"--limits-storage cannot be used ({error}); Redis needs the extra: pip install 'trimtab[redis]'"
        ) from error
    assert isinstance(storage, RedisStorage)
    return FixedWindowRateLimiter(storage)
