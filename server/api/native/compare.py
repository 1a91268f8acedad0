"""POST /compare: one prompt under up to eight steerings at once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from server.api.dependencies import ReporterDep, ServiceDep, refuse_steering_header
from server.api.document import declare
from server.api.native.compare_request import CompareBody
from server.api.native.steering_responses import CompareAnswer, CompareEvent
from server.api.openai.building import ending
from server.engines.protocol import Delta, Finished, GenerationRequest
from server.generation.choices import Generations, Result, new_id, profiles_of
from server.generation.encoding import encode, naming_field
from server.generation.receipts import told_projections
from server.http.error_responses import ErrorReporter
from server.http.json_bodies import StrictRoute
from server.http.sse import EventStreamResponse, frame, while_connected
from server.state import Service

router = APIRouter(tags=["steering"], route_class=StrictRoute, dependencies=[Depends(refuse_steering_header)])


@router.post(
    "/compare",
    summary="Compare steerings of one prompt",
    responses=declare(CompareAnswer, 400, 404, 429, 503, stream=CompareEvent),
)
async def compare(body: CompareBody, request: Request, service: ServiceDep, reporter: ReporterDep) -> Response:
    """Continue a text or a conversation under several steerings, with the same random numbers."""
    generations = await _start(body, service)
    if body.stream:
        return EventStreamResponse(_frames(generations, reporter), close=generations.close)
    results = await while_connected(request, generations.results())
    variants = [_whole(generations.requests[index], result) for index, result in enumerate(results)]
    return JSONResponse({"variants": variants})


async def _start(body: CompareBody, service: Service) -> Generations:
    engine, sampling = service.engine, body.sampling()
    find = service.registry.find
    timelines = [
        variant.wanted().timeline(partial(find, param=f"variants[{place}]"))
        for place, variant in enumerate(body.variants)
    ]
    prompt = body.the_prompt()
    ids = await encode(engine.language_model.tokenizer, prompt, body)
    profiles = profiles_of([entry for timeline in timelines for entry in timeline]) if body.projections else ()
    requests = [
        GenerationRequest(
            new_id("gen"),
            ids,
            sampling,
            timeline[0][1],
            schedule=tuple(timeline[1:]),
            divergence=body.kl,
            projections=profiles,
        )
        for timeline in timelines
    ]
    with naming_field(prompt):
        return await Generations.run(engine, requests, most=service.most_generations, param="variants")


def _whole(request: GenerationRequest, result: Result) -> dict[str, Any]:
    head = {"id": request.id, "text": result.text}
    told = {"kl": list(result.divergences)} if request.divergence else {}
    return {**head, **told, **told_projections(request, result.projections), **ending(result.finished)}


def _told(request: GenerationRequest, event: Delta) -> dict[str, Any]:
    kl = {"kl": list(event.divergences)} if event.divergences else {}
    return {**kl, **told_projections(request, event.projections)}


async def _frames(generations: Generations, reporter: ErrorReporter) -> AsyncIterator[bytes]:
    """Each variant's pieces with its number, the first one empty so that its id is known; one terminal event each."""
    names = [{"variant": index, "id": request.id} for index, request in enumerate(generations.requests)]
    for name in names:
        yield frame({**name, "delta": ""})
    try:
        async for index, event in generations.events():
            if isinstance(event, Finished):
                yield frame({**names[index], **ending(event)})
            elif isinstance(event, Delta) and (event.text or event.divergences or event.projections):
                yield frame({**names[index], "delta": event.text, **_told(generations.requests[index], event)})
    except Exception as error:
        yield frame(reporter.describe(error))
