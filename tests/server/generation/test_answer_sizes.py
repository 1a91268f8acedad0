"""How much an answer may report, of one request and of all."""

from __future__ import annotations

import pytest

from server.engines.errors import Overloaded
from server.engines.protocol import GenerationRequest, PlanTerm, SamplingParameters, SteeringPlan, StrengthSchedule
from server.generation.answer_sizes import TOGETHER, AnswerBudget, reported_values
from steering_vectors.errors import RequestError

LINE = StrengthSchedule(((0, 0.0), (4096, 1.0)), "linear")
STEPS = StrengthSchedule(((0, 0.0), (4000, 1.0)))


def plan(*schedules: StrengthSchedule | None) -> SteeringPlan:
    return SteeringPlan(tuple(PlanTerm(f"p{place}", "", schedule=one) for place, one in enumerate(schedules)))


@pytest.mark.parametrize(
    ("request_", "values"),
    [
        (GenerationRequest(("a",), (1,) * 10), 0),
        (GenerationRequest(("a", "b"), (1,) * 10, SamplingParameters(max_tokens=5), logprobs=20), 2 * 5 * 21),
        (GenerationRequest(("a",), (1,) * 10, logprobs=0), 90),
        (GenerationRequest(("a",), (1,) * 10, SamplingParameters(max_tokens=500), divergence=True), 90),
        (GenerationRequest(("a",), (1,) * 10, SamplingParameters(max_tokens=3), projections=("v", "w")), 6),
        (GenerationRequest(("a",), (1,) * 10, SamplingParameters(max_tokens=0), prompt_logprobs=4), 50),
        (GenerationRequest(("a",), (1,) * 9, SamplingParameters(max_tokens=0), prompt_logprobs=4, scored_suffix=3), 15),
        (GenerationRequest(("a",), (1,) * 10, SamplingParameters(max_tokens=7), plan(LINE, None, LINE)), 14),
        (GenerationRequest(("a",), (1,) * 10, SamplingParameters(max_tokens=7), plan(STEPS)), 2),
    ],
)  # fmt: skip
def test_what_is_reported_is_counted(request_: GenerationRequest, values: int) -> None:
    assert reported_values([request_], context=100) == values
    assert reported_values([request_] * 3, context=100) == 3 * values


def test_a_request_and_all_requests_have_a_limit() -> None:
    budget = AnswerBudget(100)
    with pytest.raises(RequestError) as failure:
        budget.take(101, "n")
    assert failure.value.message == (
        "n: the answer would report up to 101 values besides its text, of at most 100: "
        "request fewer choices, tokens or alternatives"
    )
    assert (failure.value.param, failure.value.code) == ("n", "answer_too_large")
    for _ in range(TOGETHER):
        budget.take(100, "n")
    with pytest.raises(Overloaded):
        budget.take(1, "n")
    budget.give_back(100)
    budget.take(100, "n")


@pytest.mark.parametrize("count", [17, 64])
def test_few_profiles_of_a_mix_have_a_schedule(count: int) -> None:
    assert len(plan(*[LINE] * 16, None).terms) == 17
    with pytest.raises(RequestError, match=f"{count} profiles have a schedule; at most 16 may have one"):
        plan(*[LINE] * count)
