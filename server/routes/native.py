"""POST /generate: one prompt, one profile, one text."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from server.answers import receipt, usage
from server.api_document import declare
from server.dependencies import ReporterDep, ServiceDep
from server.engine.protocol import Delta, Finished
from server.errors import ErrorReporter
from server.generations import Generations
from server.json_bodies import StrictRoute
from server.prompts import encode
from server.schemas.native import GenerateBody
from server.schemas.native_answers import GenerateAnswer, GenerateEvent
from server.service import Service
from server.streams import EventStreamResponse, frame, while_connected
from steering_vectors.mixture import Mixture

router = APIRouter(tags=["native"], route_class=StrictRoute)


@router.post(
    "/generate",
    summary="Generate one text",
    responses=declare(GenerateAnswer, 400, 404, 429, 503, stream=GenerateEvent),
)
async def generate(body: GenerateBody, request: Request, service: ServiceDep, reporter: ReporterDep) -> Response:
    """Continue a text or a conversation, steered as asked. With `stream`, events bring pieces of text, and the last one
    everything else."""
    mixture, generations = await _start(body, service)
    if body.stream:
        return EventStreamResponse(_frames(mixture, generations, reporter), close=generations.close)
    (result,) = await while_connected(request, generations.results())
    head = {"id": generations.requests[0].id, "text": result.text}
    return JSONResponse({**head, **_ending(mixture, result.finished)})


async def _start(body: GenerateBody, service: Service) -> tuple[Mixture, Generations]:
    engine = service.engine
    prompt = body.the_prompt()
    mixture = body.wanted_steering().resolve(service.registry.find)
    ids = await encode(engine.language_model.tokenizer, prompt, body)
    most = service.most_generations
    return mixture, await Generations.start(engine, [ids], body.sampling(), mixture, most=most)


async def _frames(mixture: Mixture, generations: Generations, reporter: ErrorReporter) -> AsyncIterator[bytes]:
    """Pieces of text, the first one empty so that a client knows the id at once; then one terminal event."""
    name = {"id": generations.requests[0].id}
    yield frame({**name, "delta": ""})
    try:
        async for _, event in generations.events():
            if isinstance(event, Finished):
                yield frame({**name, **_ending(mixture, event)})
            elif isinstance(event, Delta) and event.text:
                yield frame({**name, "delta": event.text})
    except Exception as error:
        yield frame({**name, **reporter.describe(error)})


def _ending(mixture: Mixture, finished: Finished) -> dict[str, Any]:
    return {
        "finish_reason": finished.reason,
        "stop_reason": finished.matched_stop,
        "usage": usage([finished]),
        "steering": receipt(mixture, [finished]),
    }
