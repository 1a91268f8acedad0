"""How much an answer reports besides its text, and how much of it all requests may have at once."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from server.engines.errors import Overloaded
from server.engines.protocol import GenerationRequest, SteeringPlan
from steering_vectors.errors import RequestError

TOGETHER = 4  # times the limit of one request


def reported_values(requests: Sequence[GenerationRequest], context: int) -> int:
    """An upper bound of the log-probabilities, alternatives, divergences, projections and changes of a schedule."""
    total = 0
    for request in requests:
        room = max(0, context - len(request.prompt_ids))
        tokens = room if request.sampling.max_tokens is None else min(request.sampling.max_tokens, room)
        each = request.divergence + len(request.projections)
        each += 0 if request.logprobs is None else 1 + request.logprobs
        values = tokens * each + _changes(request.plan, tokens)
        if request.prompt_logprobs is not None:
            values += (request.scored_suffix or len(request.prompt_ids)) * (1 + request.prompt_logprobs)
        total += request.n * values
    return total


def _changes(plan: SteeringPlan, tokens: int) -> int:
    """The number of entries of the timelines of a plan, at most."""
    schedules = [term.schedule for term in plan.terms if term.schedule is not None]
    ends = (one.points[-1][0] if one.interpolation == "linear" else len(one.points) for one in schedules)
    return len(schedules) * min(tokens, sum(ends))


class AnswerBudget:
    """Counts the values that accepted requests will report. May be used from any thread."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.used = 0
        self._lock = threading.Lock()

    def take(self, values: int, param: str) -> None:
        """Raises RequestError for more than a request may have, Overloaded if others have too many."""
        if values > self._limit:
            raise RequestError(
                f"{param}: the answer would report up to {values} values besides its text, of at most {self._limit}: "
                "request fewer choices, tokens or alternatives",
                param=param,
                code="answer_too_large",
            )
        with self._lock:
            if self.used + values > TOGETHER * self._limit:
                raise Overloaded("the answers of other requests take all of the memory for them: try again later")
            self.used += values

    def give_back(self, values: int) -> None:
        with self._lock:
            self.used -= values
