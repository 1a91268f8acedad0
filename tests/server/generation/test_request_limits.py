"""The server's limits of what one request may ask for."""

from __future__ import annotations

import asyncio

import pytest

from server.engines.errors import DeadlineExceeded
from server.engines.protocol import SamplingParameters
from server.generation.request_limits import Deadline, RequestLimits
from steering_vectors.errors import RequestError

LIMITS = RequestLimits(max_tokens=10, max_n=4, default_timeout=5.0, max_timeout=8.0)


def test_more_than_the_limits_is_refused_by_field() -> None:
    too_many = SamplingParameters(max_tokens=11)
    with pytest.raises(RequestError) as failure:
        LIMITS.sampling(too_many, "max_completion_tokens")
    expected = "max_completion_tokens is 11; this server generates at most 10 tokens for a text: ask for fewer"
    assert (failure.value.message, failure.value.param) == (expected, "max_completion_tokens")
    with pytest.raises(RequestError) as failure:
        LIMITS.check_n(5, "n")
    assert (failure.value.message, failure.value.param) == ("n is 5; this server generates at most 4 choices", "n")
    with pytest.raises(RequestError) as failure:
        LIMITS.timeout(8.5)
    expected = "timeout is 8.5 s; this server takes at most 8 s for a request"
    assert (failure.value.message, failure.value.param) == (expected, "timeout")
    LIMITS.check_n(4, "n")
    exact = SamplingParameters(max_tokens=10)
    assert LIMITS.sampling(exact, "max_tokens") == exact
    assert LIMITS.timeout(8) == 8


def test_what_is_left_out_keeps_within_the_limits() -> None:
    assert LIMITS.sampling(SamplingParameters(), None).max_tokens == 10
    assert LIMITS.sampling(SamplingParameters(max_tokens=16), None).max_tokens == 10
    assert LIMITS.sampling(SamplingParameters(max_tokens=3), None).max_tokens == 3
    assert RequestLimits().sampling(SamplingParameters(), None).max_tokens is None
    assert LIMITS.timeout(None) == 5.0
    with pytest.raises(RequestError, match=r"min_tokens \(12\) is more than max_tokens \(10\)"):
        LIMITS.sampling(SamplingParameters(min_tokens=12), None)


def test_a_deadline_cancels_and_says_what_it_cancelled() -> None:
    cancelled = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def main() -> None:
        deadline = Deadline(0.01)
        with pytest.raises(DeadlineExceeded) as failure:
            async with deadline.bounds("it still waited"):
                await work()
        assert failure.value.message == "the request was not answered within its timeout of 0.01 s: it still waited"
        assert deadline.left == 0
        with pytest.raises(DeadlineExceeded):  # the time of all parts together
            async with deadline.bounds("nothing more begins"):
                await work()
        with pytest.raises(TimeoutError, match="of someone else"):
            async with Deadline(60).bounds("it went on"):
                raise TimeoutError("of someone else")

    asyncio.run(main())
    assert cancelled == [True, True]
