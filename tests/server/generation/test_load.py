"""How many generations there may be, and when to come back."""

from __future__ import annotations

import pytest

from server.engines.errors import Overloaded
from server.engines.protocol import Finished, Times
from server.generation.load import MAX_RETRY_SECONDS, Load


def finished(seconds: float, name: str = "a") -> Finished:
    return Finished(name, "stop", times=Times(queue=99.0, prefill=seconds / 4, decode=3 * seconds / 4))


def test_neither_a_request_nor_a_tenant_fills_the_queue() -> None:
    load = Load(slots=2, capacity=10, share=0.5)
    assert load.most == 6
    first = load.take("a", 4)
    with pytest.raises(Overloaded, match="4 generations of this key are running or waiting already, of at most 6"):
        load.take("a", 3)
    load.take("b", 6)
    with pytest.raises(Overloaded, match="10 generations are running or waiting already"):
        load.check_room("c")
    first.close()
    load.check_room("c", 4)


def test_without_keys_all_requests_together_may_fill_it() -> None:
    load = Load(slots=2, capacity=10, share=0.5)
    places = [load.take("", 5), load.take("", 5)]
    with pytest.raises(Overloaded):
        load.take("", 1)
    for place in places:
        place.close()
    assert load.total == 0


def test_a_generation_leaves_when_it_has_ended_and_no_more_than_once() -> None:
    load = Load(slots=2, capacity=10, share=1.0)
    place = load.take("a", 3)
    place.finished(finished(1.0))
    assert load.total == 2
    place.close()
    place.close()
    place.finished(finished(1.0))
    assert load.total == 0
    load.take("a", 10)  # nothing is left of the tenant


def test_when_to_come_back_follows_from_the_time_that_generations_take() -> None:
    load = Load(slots=4, capacity=100, share=1.0)
    place = load.take("a", 43)
    assert load.retry_after() == 1  # nothing is known yet
    for _ in range(3):
        place.finished(finished(2.0))
    place.finished(Finished("late", "timeout", times=Times(queue=5.0, prefill=0.0, decode=0.0)))  # it had no slot
    assert load.total == 39
    assert load.retry_after() == 18  # 36 × 2 s / 4
    load.note(12.0)
    assert load.retry_after() == 27  # the mean is 0.9 × 2 + 0.1 × 12
    load.note(1000.0)
    assert load.retry_after() == MAX_RETRY_SECONDS
    place.close()
    assert load.retry_after() < MAX_RETRY_SECONDS
