"""The choices of one HTTP request, and their events in one stream."""

from __future__ import annotations

import math
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from server.engines.errors import GenerationFailed, Unavailable
from server.engines.protocol import Delta, Event, EventStream, Finished, GenerationRequest, PromptLogprobs, TokenLogprob
from server.generation.client_errors import client_errors
from server.generation.request_limits import deadline_exceeded
from server.observability import request_record
from steering_vectors.errors import RequestError

CHARGED_AT_ONCE = 64  # tokens


@dataclass(frozen=True, slots=True)
class Choice:
    """One choice of a request, by its generation's id."""

    id: str
    request: GenerationRequest
    names: Mapping[str, str]  # of profiles, by version

    def by_profile(self, projections: Sequence[Sequence[float]]) -> dict[str, list[float]]:
        """The columns of `[tokens][profiles]`, by the profiles' names."""
        columns = zip(*projections, strict=True) if projections else [()] * len(self.request.projections)
        pairs = zip(self.request.projections, columns, strict=True)
        return {self.names[version]: list(column) for version, column in pairs}


@dataclass(frozen=True, slots=True)
class Result:
    """A choice that has ended: its whole text, its last event, and what was reported for its tokens."""

    text: str
    finished: Finished
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    divergences: tuple[float, ...] = ()
    projections: tuple[tuple[float, ...], ...] = ()


class Keeping(Protocol):
    """Keeps what one HTTP request generates. `answer_id` is the id of its answer, if that has one."""

    answer_id: str | None

    def event(self, place: int, choice: Choice, event: Event) -> None:
        """The engine has sent an event of the choice at this place."""
        ...


class Generations:
    """What the engine runs for one HTTP request: choice i·n + j is choice j of request i, drawn from (seed, j)."""

    def __init__(
        self,
        requests: Sequence[GenerationRequest],
        stream: EventStream,
        fields: Mapping[str, str],
        charge: Callable[[int], None],
        *,
        values: int = 0,
        ended: Callable[[], None] = lambda: None,
        finished: Callable[[Finished], None] = lambda event: None,
        timeout: float = math.inf,
        keeping: Keeping | None = None,
    ) -> None:
        """`charge` is called with the numbers of tokens that were generated, now and then and at the end. `values` are
        reported besides the text, at most. `ended` is called once, when this is closed or dropped, `finished` with the
        last event of each choice. `timeout` is what errors name."""
        self.n = requests[0].n
        names = {term.version: term.profile for request in requests for term in request.plan.terms}
        self.choices = [Choice(name, request, names) for request in requests for name in request.ids]
        self._places = {choice.id: place for place, choice in enumerate(self.choices)}
        self._stream = stream
        self._fields = fields
        self._charge = charge
        self._uncharged = 0
        self._record = request_record.current()
        self.values = values
        self._finished = finished
        self._timeout = timeout
        self.keeping = keeping
        self._end = weakref.finalize(self, ended)

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Events of all choices as they come, each with its choice's index; one Finished for each. Raises in place of a
        Finished with an error: RequestError if the request caused it, else DeadlineExceeded, GenerationFailed or
        Unavailable."""
        async for event in self._stream:
            if self._record is not None:
                self._record.event(event)
            if isinstance(event, Finished):
                self._finished(event)
                with client_errors(self._fields):
                    _raise_failure(event, self._timeout)
            elif isinstance(event, Delta):
                self._count(len(event.token_ids))
            place = self._places[event.id]
            if self.keeping is not None:
                self.keeping.event(place, self.choices[place], event)
            yield place, event

    async def results(self) -> list[Result]:
        """Wait for all choices. Raises as `events` does, and closes the rest."""
        received: list[list[Event]] = [[] for _ in self.choices]
        try:
            async for index, event in self.events():
                received[index].append(event)
        finally:
            await self.close()
        return [_result(events) for events in received]

    async def close(self) -> None:
        """Cancel what still runs. Never waits, so that it also works in a task that is being cancelled."""
        self._end()
        self._charge(self._uncharged)
        self._uncharged = 0
        await self._stream.aclose()

    def _count(self, tokens: int) -> None:
        self._uncharged += tokens
        if self._uncharged >= CHARGED_AT_ONCE:
            self._charge(self._uncharged)
            self._uncharged = 0


def _result(events: Sequence[Event]) -> Result:
    deltas = [event for event in events if isinstance(event, Delta)]
    (finished,) = (event for event in events if isinstance(event, Finished))
    return Result(
        "".join(delta.text for delta in deltas),
        finished,
        tuple(one for delta in deltas for one in delta.logprobs),
        tuple(one for event in events if isinstance(event, PromptLogprobs) for one in event.tokens),
        tuple(one for delta in deltas for one in delta.divergences),
        tuple(one for delta in deltas for one in delta.projections),
    )


def _raise_failure(finished: Finished, timeout: float) -> None:
    if finished.reason == "timeout":
        raise deadline_exceeded(timeout, finished.error or "it was not finished")
    if finished.reason == "cancelled":
        raise Unavailable("the generation was cancelled by the server: send the request again", code="cancelled")
    if finished.reason == "error":
        message = finished.error or "the generation failed"
        if finished.error_param is None:
            raise GenerationFailed(message)
        raise RequestError(message, param=finished.error_param, code=GenerationFailed.code)
