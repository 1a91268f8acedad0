"""What a user did with an answer, as numbers."""

from __future__ import annotations

import math

import pytest

from benchmarks.learning.crowd import signal
from server.feedback.items import Answer, ChatTurn
from server.learning.behaviour.signals import MAX_DWELL, behaviours_of, dwell

ANSWER: Answer = {"prompt": "p", "text": "one two three four"}


def test_what_is_done_twice_counts_once_and_chats_are_prompts() -> None:
    turns: list[ChatTurn] = [{"role": "user", "content": "p"}]
    given = [signal("u", ANSWER, "copied")] * 500
    given += [signal("u", {**ANSWER, "prompt": turns}, "abandoned"), signal("v", ANSWER, "continued")]
    first, second = behaviours_of(given)
    assert (first.user, first.values) == ("u", (1.0, 0.0, 0.0, 1.0, 0.0))
    assert (second.user, second.values) == ("v", (0.0, 0.0, 1.0, 0.0, 0.0))
    assert first.place == second.place


def test_the_user_is_who_asked_if_the_signal_names_none() -> None:
    one = signal("asker", ANSWER, "copied")
    assert [found.user for found in behaviours_of([one])] == ["asker"]
    assert [found.user for found in behaviours_of([signal(None, ANSWER, "copied")])] == [None]


def test_prompts_of_token_ids_and_other_feedback_are_no_behaviours() -> None:
    assert behaviours_of([signal("u", {"prompt": [1, 2], "text": "a"}, "copied")]) == []


@pytest.mark.parametrize(("seconds", "value"), [(1.0, 0.0), (2.0, math.log(2)), (0.0, -MAX_DWELL), (1e9, MAX_DWELL)])
def test_dwell_times_are_compared_with_reading(seconds: float, value: float) -> None:
    assert dwell(seconds, "one two three four") == pytest.approx(value)
    last = [signal("u", ANSWER, "dwell_seconds", 99), signal("u", ANSWER, "dwell_seconds", seconds)]
    assert behaviours_of(last)[0].values[-1] == pytest.approx(value)
