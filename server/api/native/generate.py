"""POST /generate: one prompt, one profile, one text."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from server.api.dependencies import ReporterDep, ServiceDep, SteeringHeader
from server.api.document import declare
from server.api.native.generate_request import GenerateBody
from server.api.native.responses import GenerateAnswer, GenerateEvent
from server.api.openai.building import ending
from server.engines.protocol import Delta, Finished
from server.generation.choices import Generations
from server.generation.encoding import encode, naming_field
from server.generation.receipts import told_projections
from server.http.error_responses import ErrorReporter
from server.http.json_bodies import StrictRoute
from server.http.sse import EventStreamResponse, frame, while_connected
from server.state import Service

router = APIRouter(tags=["native"], route_class=StrictRoute)


@router.post(
    "/generate",
    summary="Generate one text",
    responses=declare(GenerateAnswer, 400, 404, 429, 503, stream=GenerateEvent),
)
async def generate(
    body: GenerateBody, request: Request, service: ServiceDep, reporter: ReporterDep, steering: SteeringHeader = None
) -> Response:
    """Continue a text or a conversation, steered as asked. With `stream`, events bring pieces of text, and the last one
    everything else."""
    generations = await _start(body, steering, service)
    if body.stream:
        return EventStreamResponse(_frames(generations, reporter), close=generations.close)
    (result,) = await while_connected(request, generations.results())
    request_made = generations.requests[0]
    head = {"id": request_made.id, "text": result.text, **told_projections(request_made, result.projections)}
    return JSONResponse({**head, **ending(result.finished)})


async def _start(body: GenerateBody, header: str | None, service: Service) -> Generations:
    engine = service.engine
    prompt, sampling, constraint = body.the_prompt(), body.sampling(), body.constraint()
    find = partial(service.registry.find, param="steering" if body.profile is None else "profile")
    timeline = body.wanted_steering(header).timeline(find)
    with naming_field(prompt):
        return await Generations.start(
            engine,
            [await encode(engine.language_model.tokenizer, prompt, body)],
            sampling,
            timeline,
            most=service.most_generations,
            projections=body.projections,
            constraint=constraint,
        )


async def _frames(generations: Generations, reporter: ErrorReporter) -> AsyncIterator[bytes]:
    """Pieces of text, the first one empty so that a client knows the id at once; then one terminal event."""
    (request,) = generations.requests
    name = {"id": request.id}
    yield frame({**name, "delta": ""})
    try:
        async for _, event in generations.events():
            if isinstance(event, Finished):
                yield frame({**name, **ending(event)})
            elif isinstance(event, Delta) and (event.text or event.projections):
                yield frame({**name, "delta": event.text, **told_projections(request, event.projections)})
    except Exception as error:
        yield frame(reporter.describe(error))
