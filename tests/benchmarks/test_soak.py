"""What the client of the soak counts, and that a count that differs is seen. How a soak goes depends on the machine, so
its run is `make soak`."""

from __future__ import annotations

from collections import Counter

from benchmarks.reliability.attempts import Answer, Attempt, Leave
from benchmarks.reliability.soak import Books, Series, _equal, count, outcome_of, terminal_events


def attempt(number: int, leave: Leave | None = None) -> Attempt:
    return Attempt(f"soak-{number}", "/generate", "POST", "/generate", b'{"max_tokens": 3}', "key", leave)


def test_what_the_client_counts() -> None:
    usage = {"prompt_tokens": 2, "completion_tokens": 3}
    whole = Answer(attempt(1), 200, [{"finish_reason": "stop", "usage": usage}], is_stream=True, sent=True)
    refused = Answer(attempt(2), 429, [{"error": {"code": "overloaded", "type": "rate_limit_error"}}], sent=True)
    left = Answer(attempt(3, Leave("events")), 200, left=True, sent=True)
    line = {"outcome": "disconnected", "status": 200, "generations": 1, "completion_tokens": 2}
    assert [outcome_of(one) for one in (whole, refused)] == ["success", "overloaded"]
    assert terminal_events(whole) == 1
    books = count([whole, refused, left], {"soak-3": [line]})
    outcomes = {("/generate", "POST", outcome): 1 for outcome in ("success", "overloaded", "disconnected")}
    assert books == Books(Counter(outcomes), Counter({("429", "overloaded"): 1}), changes=0, tokens=3, generations=2)


def test_a_count_that_differs_is_seen() -> None:
    books = Books(Counter({("/generate", "POST", "success"): 2}), Counter(), changes=0, tokens=6, generations=2)
    labels = (("method", "POST"), ("outcome", "success"), ("route", "/generate"))
    document = (("method", "GET"), ("outcome", "success"), ("route", "_unmatched"))
    metrics: Series = Counter(
        {
            ("trimtab_requests_total", labels): 2,
            ("trimtab_requests_total", document): 1,
            ("trimtab_request_generation_tokens_sum", ()): 6,
            ("trimtab_generations_total", (("finished_reason", "stop"),)): 2,
        }
    )
    assert [one.kept for one in _equal(books, metrics)] == [True] * 5
    metrics["trimtab_requests_total", labels] += 1
    metrics["trimtab_request_generation_tokens_sum", ()] -= 1
    assert [one.kept for one in _equal(books, metrics)] == [False, True, True, False, True]
