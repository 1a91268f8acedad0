"""How many prompt tokens fit into the time that decoding rows may wait."""

from __future__ import annotations

import math

import pytest

from server.engines.torch.scheduling.budget import MIN_BUDGET, STALL_PASSES, PrefillBudget


def test_before_anything_is_known_nothing_is_bounded() -> None:
    budget = PrefillBudget(256)
    assert budget.tokens() == 256
    budget.note_prompts(100, 1.0)
    assert budget.tokens() == 256  # nothing has decoded, so none knows how long a pass is


def test_without_a_time_it_is_that_of_decoding() -> None:
    budget = PrefillBudget(256)
    budget.note_decoding(0.02)
    budget.note_prompts(100, 0.05)
    assert budget.tokens() == int(STALL_PASSES * 0.02 / 0.0005)


@pytest.mark.parametrize(("per_token", "tokens"), [(0.001, 50), (0.00001, 256), (1.0, MIN_BUDGET)])
def test_the_time_over_the_cost_of_a_token_within_bounds(per_token: float, tokens: int) -> None:
    budget = PrefillBudget(256, 0.05)
    budget.note_decoding(0.001)
    budget.note_prompts(10, 10 * per_token)
    assert budget.tokens() == tokens


def test_what_is_learnt_follows_what_is_seen() -> None:
    budget = PrefillBudget(10_000, 0.1)
    for seconds in (1.0, *[0.1] * 30):
        budget.note_prompts(100, seconds)
    assert budget.tokens() == pytest.approx(100, rel=0.02)


def test_a_new_pass_counts_a_fifth() -> None:
    budget = PrefillBudget(10_000)
    for seconds in (0.1, 0.2):
        budget.note_decoding(seconds)
        budget.note_prompts(100, seconds)
    for seconds in (0.1, 0.2, 0.4):
        budget.note_prompts(100, seconds)
    decoding, token = 0.12, 0.0
    for number, seconds in enumerate((0.1, 0.2, 0.1, 0.2, 0.4)):
        token = 0.8 * token + 0.2 * seconds if number else seconds
    assert budget.tokens() == int(STALL_PASSES * decoding / (token / 100))


def test_a_prompt_that_cannot_be_cut_is_not() -> None:
    budget = PrefillBudget(4096, math.inf)
    budget.note_decoding(0.001)
    budget.note_prompts(10, 10.0)
    assert budget.tokens() == 4096


def test_a_bound_below_the_least_holds() -> None:
    budget = PrefillBudget(4, 0.001)
    budget.note_prompts(10, 10.0)
    assert budget.tokens() == 4
