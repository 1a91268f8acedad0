"""What one request may ask for, and the time in which it must be answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from server.engines.errors import DeadlineExceeded, reject
from server.engines.protocol import SamplingParameters


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The server's limits of every request: choices of a prompt, tokens of a choice, and seconds.

    A request that asks for more is refused. One that leaves a number out gets the default, or the
    limit if that is less.
    """

    default_timeout: float = 600.0
    max_timeout: float = 3600.0
    max_tokens: int | None = None
    max_n: int | None = None

    def check_n(self, n: int, param: str) -> None:
        most = self.max_n
        reject(most is not None and n > most, f"{param} is {n}; this server generates at most {most} choices", param)

    def sampling(self, asked: SamplingParameters, param: str | None) -> SamplingParameters:
        """`param` is the field that gives `max_tokens`, None if the request leaves it out. Raises RequestError."""
        most, count = self.max_tokens, asked.max_tokens
        if most is None:
            return asked
        if param is None:
            return replace(asked, max_tokens=most if count is None else min(count, most))
        message = f"{param} is {count}; this server generates at most {most} tokens for a text: ask for fewer"
        reject(count is not None and count > most, message, param)
        return asked

    def timeout(self, asked: float | None) -> float:
        """The seconds for a request. Raises RequestError."""
        if asked is None:
            return self.default_timeout
        most = self.max_timeout
        reject(asked > most, f"timeout is {asked:g} s; this server takes at most {most:g} s for a request", "timeout")
        return asked


class Deadline:
    """The time of one request, by the event loop's monotonic clock."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = asyncio.get_running_loop().time() + seconds

    @property
    def left(self) -> float:
        return max(0.0, self._end - asyncio.get_running_loop().time())

    @asynccontextmanager
    async def bounds(self, doing: str) -> AsyncIterator[None]:
        """Cancel what is inside when the time is over. Raises DeadlineExceeded, which says what it was doing."""
        try:
            async with asyncio.timeout_at(self._end) as timeout:
                yield
        except TimeoutError:
            if not timeout.expired():
                raise
            raise deadline_exceeded(self.seconds, doing) from None


def deadline_exceeded(timeout: float, progress: str) -> DeadlineExceeded:
    message = f"the request was not answered within its timeout of {timeout:g} s: {progress}"
    return DeadlineExceeded(message, param="timeout")
