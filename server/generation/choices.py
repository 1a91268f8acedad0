"""The choices of one HTTP request: each is a request of the engine, and together they are one stream of events.

Owns their starting (all or none), their interleaving and their closing. Knows nothing of the shapes of answers.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from server.engines.protocol import (
    Constraint,
    Delta,
    Engine,
    Event,
    EventStream,
    Finished,
    GenerationRequest,
    PromptLogprobs,
    SamplingParameters,
    TokenLogprob,
)
from steering_vectors.errors import RequestError, TrimtabError, Unavailable
from steering_vectors.profiles.mixture import Mixture
from steering_vectors.profiles.profile import Profile


class GenerationFailed(TrimtabError):
    """The engine accepted a request and could not finish it."""

    code = "generation_failed"


@dataclass(frozen=True, slots=True)
class Result:
    """A choice that has ended: its whole text, its last event, and the log-probabilities that were asked for."""

    text: str
    finished: Finished
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    divergences: tuple[float, ...] = ()
    projections: tuple[tuple[float, ...], ...] = ()


class Generations:
    """Index i·n + j is choice j of prompt i, drawn from (seed, j): each prompt gets what it would get alone."""

    def __init__(self, requests: Sequence[GenerationRequest], streams: Sequence[EventStream]) -> None:
        self.requests = requests
        self._streams = streams
        self._pumps: list[asyncio.Task[None]] = []

    def __len__(self) -> int:
        return len(self.requests)

    @classmethod
    async def start(
        cls,
        engine: Engine,
        prompts: Sequence[tuple[int, ...]],
        sampling: SamplingParameters,
        timeline: Sequence[tuple[int, Mixture]],
        *,
        n: int = 1,
        most: int,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        projections: bool = False,
        constraint: Constraint | None = None,
    ) -> Generations:
        """Run n choices of each prompt. `timeline` has the mix at the start, then those that follow, each from a token
        of the completion on; `projections` asks for those on all of its profiles. Raises as `run` does."""
        profiles = profiles_of(timeline) if projections else ()
        if len(prompts) * n > most:
            raise too_many(len(prompts) * n, most, "n" if n > 1 else "prompt")
        grammar = None if constraint is None else await engine.compile(constraint)
        requests = [
            GenerationRequest(
                new_id("gen"),
                ids,
                sampling,
                timeline[0][1],
                choice,
                logprobs,
                prompt_logprobs,
                schedule=tuple(timeline[1:]),
                projections=profiles,
                grammar=grammar,
            )
            for ids in prompts
            for choice in range(n)
        ]
        return await cls.run(engine, requests, most=most)

    @classmethod
    async def run(
        cls, engine: Engine, requests: Sequence[GenerationRequest], *, most: int, param: str = "n"
    ) -> Generations:
        """Hand all requests to the engine; if it refuses one, none runs. Raises RequestError and its kinds.

        `most` is how many the engine holds at once: more than that could never be accepted.
        """
        if len(requests) > most:
            raise too_many(len(requests), most, param)
        streams: list[EventStream] = []
        try:
            for request in requests:
                streams.append(engine.generate(request))
        except BaseException:
            await _close(streams)
            raise
        return cls(requests, streams)

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Events of all choices as they come, each with its choice's index; one Finished for each.

        Raises in the place of a Finished that tells of an error: RequestError if the request is to blame, else
        GenerationFailed or Unavailable.
        """
        arrived: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()
        self._pumps = [asyncio.create_task(_pump(index, stream, arrived)) for index, stream in enumerate(self._streams)]
        running = len(self)
        while running:
            index, event = await arrived.get()
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Finished):
                _raise_failure(event)
                running -= 1
            yield index, event

    async def results(self) -> list[Result]:
        """Wait for all choices. Raises as `events` does, and closes the rest."""
        received: list[list[Event]] = [[] for _ in self.requests]
        try:
            async for index, event in self.events():
                received[index].append(event)
        finally:
            await self.close()
        return [_result(events) for events in received]

    async def close(self) -> None:
        """Cancel what still runs. Never waits, so it also works in a task that is being cancelled."""
        for pump in self._pumps:
            pump.cancel()
        await _close(self._streams)


def profiles_of(timeline: Sequence[tuple[int, Mixture]]) -> tuple[Profile, ...]:
    """All profiles that a steering names, each once, in their order."""
    return tuple({id(term.profile): term.profile for _, mixture in timeline for term in mixture.terms}.values())


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


def too_many(count: int, most: int, param: str) -> RequestError:
    return RequestError(
        f"{param}: {count} at once are more than the {most} that this server runs and queues; ask for fewer",
        param=param,
    )


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"


def _raise_failure(finished: Finished) -> None:
    if finished.reason == "cancelled":
        raise Unavailable("the generation was cancelled by the server: send the request again", code="cancelled")
    if finished.reason == "error":
        message = finished.error or "the generation failed"
        if finished.blamed is not None:
            raise RequestError(message, param=finished.blamed, code=GenerationFailed.code)
        raise GenerationFailed(message)


async def _close(streams: Sequence[EventStream]) -> None:
    for stream in streams:
        await stream.aclose()


async def _pump(index: int, stream: EventStream, arrived: asyncio.Queue[tuple[int, Event | Exception]]) -> None:
    try:
        async for event in stream:
            arrived.put_nowait((index, event))
    except Exception as error:
        arrived.put_nowait((index, error))
