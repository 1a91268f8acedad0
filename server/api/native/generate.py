"""POST /generate: one prompt, one text."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, ClassVar, NotRequired, cast

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field
from typing_extensions import TypedDict

from server.api.dependencies import IntakeDep, SteeringHeader
from server.api.document import GENERATING, declare
from server.api.fields.body import Examples, NoOps
from server.api.fields.constraints import ConstrainedBody
from server.api.fields.prompts import OnePromptBody, ProjectionsBody
from server.api.fields.sampling import COMPLETION_TOKENS, SamplingBody, refuse_no_tokens
from server.api.fields.steering import Steering
from server.api.fields.unsupported import NATIVE_NO_OPS
from server.engines.protocol import Delta, Finished, PlanTerm, SamplingParameters, SteeringPlan
from server.generation.choices import Choice, Generations, Result
from server.generation.intake import Ask
from server.generation.receipts import (
    EXAMPLE_RECEIPT,
    EXAMPLE_USAGE,
    FinishReason,
    Projections,
    Receipts,
    StopReason,
    Usage,
    finish_reason,
    receipt,
    usage,
)
from server.generation.steering_grammar import EXAMPLE, HEADER, of_header, only_one
from server.http.answers import about
from server.http.json_bodies import StrictRoute
from server.http.sse import EventStreamResponse, while_connected
from steering_vectors.errors import SteeringError

GenerationId = Annotated[str, about("The id of the generation; `PATCH /generations/{id}` takes it.")]


class GenerateEnd(TypedDict):
    """The last event of a streamed text."""

    id: GenerationId
    finish_reason: FinishReason
    stop_reason: StopReason
    usage: Annotated[Usage, about("Token counts.")]
    steering: Receipts


class GenerateAnswer(GenerateEnd):
    """The answer to POST /generate."""

    text: Annotated[str, about("The generated text.")]
    projections: NotRequired[Projections]


class GenerateDelta(TypedDict):
    """A piece of a streamed text. The first one is empty and sent at once."""

    id: GenerationId
    delta: Annotated[str, about("The next piece of text.")]
    projections: NotRequired[Projections]


EXAMPLE_DELTA: GenerateDelta = {"id": "gen-c9f0f895", "delta": "Mix flour"}
EXAMPLE_END: GenerateEnd = {
    "id": "gen-c9f0f895",
    "finish_reason": "stop",
    "stop_reason": None,
    "usage": EXAMPLE_USAGE,
    "steering": [EXAMPLE_RECEIPT],
}
EXAMPLE_ANSWER = cast(GenerateAnswer, {"id": "gen-c9f0f895", "text": "Mix flour, water and yeast.", **EXAMPLE_END})


class TextBody(SamplingBody, OnePromptBody, ProjectionsBody):
    """The fields of the native routes that generate. A conversation has no default limit, a text OpenAI's."""

    no_ops: ClassVar[NoOps] = NATIVE_NO_OPS

    stream: bool = Field(False, description="Answer with server-sent events.")

    def sampling(self, default_max_tokens: int | None = None) -> SamplingParameters:
        return refuse_no_tokens(super().sampling(COMPLETION_TOKENS if self.messages is None else default_max_tokens))


class GenerateBody(TextBody, ConstrainedBody):
    """The body of POST /generate: one prompt or conversation, and one steering."""

    examples: ClassVar[Examples] = (
        {
            "messages": [{"role": "user", "content": "How do I bake bread?"}],
            "profile": "warm",
            "strength": 0.8,
            "max_tokens": 60,
            "seed": 7,
        },
    )

    profile: str | None = Field(
        None, description="One profile to steer by, NAME or NAME#SHA8.", examples=["warm", "warm#fb09e9ae"]
    )
    strength: float | None = Field(None, description="The profile's strength, 1 by default.", examples=[0.8])
    steering: Steering | None = Field(
        None, description="A mix of profiles. Exclusive with `profile`.", examples=[EXAMPLE]
    )

    def ask(self, served: str, header: str | None) -> Ask:
        return Ask(
            (self.the_prompt(),),
            encoding=self,
            plans={"steering" if self.profile is None else "profile": self._plan(header)},
            sampling=self.sampling(),
            constraints=self.constraints(),
            projections=self.projections,
        )

    def _plan(self, header: str | None) -> SteeringPlan:
        if self.strength is not None and self.profile is None:
            raise SteeringError("strength is given without profile: name the profile it is for", param="strength")
        if self.profile is not None and self.steering is not None:
            raise SteeringError("profile and steering are both given: use only one of them", param="steering")
        strength = 1.0 if self.strength is None else self.strength
        sources = {
            "the field profile": SteeringPlan((PlanTerm(self.profile, "", strength),)) if self.profile else None,
            "the field steering": None if self.steering is None else self.steering.plan(),
            f"the header {HEADER}": of_header(header),
        }
        return only_one(sources) or SteeringPlan()


router = APIRouter(tags=["native"], route_class=StrictRoute)


@router.post(
    "/generate",
    summary="Generate one text",
    responses=declare(
        GenerateAnswer,
        EXAMPLE_ANSWER,
        *GENERATING,
        stream=GenerateDelta | GenerateEnd,
        events=[EXAMPLE_DELTA, EXAMPLE_END],
    ),
)
async def generate(
    body: GenerateBody, request: Request, intake: IntakeDep, steering: SteeringHeader = None
) -> Response:
    """Continue a text or a conversation under a steering. With `stream`, events have the pieces of the text, and the
    last one has everything else."""
    generations = await intake.submit(body, steering)
    if body.stream:
        return EventStreamResponse(_events(generations), close=generations.close)
    (result,) = await while_connected(request, generations.results())
    return JSONResponse(answer_of(generations.choices[0], result))


def answer_of(choice: Choice, result: Result) -> GenerateAnswer:
    head = {"id": choice.id, "text": result.text}
    answer = cast(GenerateAnswer, {**head, **last_event(choice, result.finished)})
    if choice.request.projections:
        answer["projections"] = choice.by_profile(result.projections)
    return answer


def delta_event(choice: Choice, event: Delta) -> GenerateDelta:
    delta: GenerateDelta = {"id": choice.id, "delta": event.text}
    if event.projections:
        delta["projections"] = choice.by_profile(event.projections)
    return delta


def last_event(choice: Choice, finished: Finished) -> GenerateEnd:
    return {
        "id": choice.id,
        "finish_reason": finish_reason(finished),
        "stop_reason": finished.matched_stop,
        "usage": usage([finished]),
        "steering": receipt([finished]),
    }


async def _events(generations: Generations) -> AsyncIterator[GenerateDelta | GenerateEnd]:
    (choice,) = generations.choices
    yield {"id": choice.id, "delta": ""}  # at once, for the id
    async for _, event in generations.events():
        if isinstance(event, Finished):
            yield last_event(choice, event)
        elif isinstance(event, Delta) and (event.text or event.projections):
            yield delta_event(choice, event)
