"""POST /compare: one prompt under up to eight steerings at once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, ClassVar, NotRequired, cast

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field
from typing_extensions import TypedDict

from server.api.dependencies import IntakeDep, refuse_steering_header
from server.api.document import GENERATING, declare
from server.api.fields.body import Examples
from server.api.fields.steering import Steering
from server.api.native.generate import (
    EXAMPLE_ANSWER,
    EXAMPLE_DELTA,
    EXAMPLE_END,
    GenerateAnswer,
    GenerateDelta,
    GenerateEnd,
    TextBody,
    answer_of,
    delta_event,
    last_event,
)
from server.engines.protocol import Delta, Finished
from server.generation.choices import Choice, Generations, Result
from server.generation.intake import Ask
from server.http.answers import about
from server.http.json_bodies import StrictRoute
from server.http.sse import EventStreamResponse, while_connected

MAX_VARIANTS = 8

Divergences = Annotated[
    list[float], about("With `kl`: KL(steered‖unsteered) in nats of the distribution of each token.")
]
VariantIndex = Annotated[int, about("The variant, from 0.")]


class CompareVariant(GenerateAnswer):
    """The text of one variant."""

    kl: NotRequired[Divergences]


class CompareAnswer(TypedDict):
    """The answer to POST /compare."""

    variants: Annotated[list[CompareVariant], about("In the order of the request.")]


class CompareDelta(GenerateDelta):
    """A piece of a variant's text. The first one of each variant is empty and sent at once."""

    variant: VariantIndex
    kl: NotRequired[Divergences]


class CompareEnd(GenerateEnd):
    """The last event of a variant."""

    variant: VariantIndex


EXAMPLE_COMPARISON: CompareAnswer = {"variants": [{**EXAMPLE_ANSWER, "kl": [0.01, 0.2]}]}
EXAMPLE_VARIANT_DELTA: CompareDelta = {**EXAMPLE_DELTA, "variant": 0, "kl": [0.01, 0.02]}
EXAMPLE_VARIANT_END: CompareEnd = {**EXAMPLE_END, "variant": 0}


class CompareBody(TextBody):
    """The body of POST /compare. All variants sample with the same random numbers."""

    examples: ClassVar[Examples] = (
        {"prompt": "Bread is", "variants": ["warm@0.8", {"profiles": []}], "max_tokens": 12, "kl": True, "seed": 7},
    )

    variants: list[Steering] = Field(
        min_length=1,
        max_length=MAX_VARIANTS,
        description="The steerings; one with an empty list of profiles is the unsteered model.",
    )
    kl: bool = Field(False, description="Report KL(steered‖unsteered) of each token's distribution, in nats.")

    def ask(self, served: str, header: str | None) -> Ask:
        return Ask(
            (self.the_prompt(),),
            encoding=self,
            plans={f"variants[{place}]": variant.plan() for place, variant in enumerate(self.variants)},
            sampling=self.sampling(),
            divergence=self.kl,
            projections=self.projections,
            counted="variants",
        )


router = APIRouter(tags=["steering"], route_class=StrictRoute, dependencies=[Depends(refuse_steering_header)])


@router.post(
    "/compare",
    summary="Compare steerings of one prompt",
    responses=declare(
        CompareAnswer,
        EXAMPLE_COMPARISON,
        *GENERATING,
        stream=CompareDelta | CompareEnd,
        events=[EXAMPLE_VARIANT_DELTA, EXAMPLE_VARIANT_END],
    ),
)
async def compare(body: CompareBody, request: Request, intake: IntakeDep) -> Response:
    """Continue a text or a conversation under several steerings, with the same random numbers. With `stream`, the
    events of the variants are interleaved."""
    generations = await intake.submit(body)
    if body.stream:
        return EventStreamResponse(_events(generations), close=generations.close)
    results = await while_connected(request, generations.results())
    pairs = zip(generations.choices, results, strict=True)
    return JSONResponse(CompareAnswer(variants=[_variant(choice, result) for choice, result in pairs]))


def _variant(choice: Choice, result: Result) -> CompareVariant:
    variant = cast(CompareVariant, answer_of(choice, result))
    if choice.request.divergence:
        variant["kl"] = list(result.divergences)
    return variant


def _delta(index: int, choice: Choice, event: Delta) -> CompareDelta:
    delta = cast(CompareDelta, {**delta_event(choice, event), "variant": index})
    if event.divergences:
        delta["kl"] = list(event.divergences)
    return delta


async def _events(generations: Generations) -> AsyncIterator[CompareDelta | CompareEnd]:
    choices = generations.choices
    for index, choice in enumerate(choices):
        yield {"id": choice.id, "delta": "", "variant": index}  # at once, for the ids
    async for index, event in generations.events():
        if isinstance(event, Finished):
            yield {**last_event(choices[index], event), "variant": index}
        elif isinstance(event, Delta) and (event.text or event.divergences or event.projections):
            yield _delta(index, choices[index], event)
