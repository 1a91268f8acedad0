"""OpenAI's routes: chat completions, completions and models."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import JSONResponse

from server.api.dependencies import EngineDep, IntakeDep, ModelNameDep, RegistryDep, ServiceDep, SteeringHeader
from server.api.document import GENERATING, declare
from server.api.openai.requests import ChatBody, CompletionBody, OpenAIBody
from server.api.openai.responses import (
    EXAMPLE_ALIAS,
    EXAMPLE_CHAT,
    EXAMPLE_CHAT_CHUNK,
    EXAMPLE_COMPLETION,
    EXAMPLE_COMPLETION_CHUNK,
    EXAMPLE_MODEL,
    AnswerWriter,
    ChatChunk,
    ChatCompletion,
    ChatWriter,
    Completion,
    CompletionChunk,
    CompletionWriter,
    ModelEntry,
    ModelList,
    Part,
    Whole,
)
from server.engines.errors import UnknownModel, UnknownRoute
from server.generation.intake import new_id
from server.http.json_bodies import StrictRoute
from server.http.sse import DONE, EventStreamResponse, while_connected
from steering_vectors.data.chat import chat_template_source
from steering_vectors.profiles.profile import Profile

router = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=StrictRoute)


@router.post(
    "/chat/completions",
    summary="Reply in a conversation",
    responses=declare(
        ChatCompletion, EXAMPLE_CHAT, *GENERATING, stream=ChatChunk, events=[EXAMPLE_CHAT_CHUNK], ends_in=DONE
    ),
)
async def chat_completions(
    body: ChatBody, request: Request, service: ServiceDep, intake: IntakeDep, steering: SteeringHeader = None
) -> Response:
    """Generate the next turn of a conversation under a steering. With `stream`, chunks are sent as server-sent events;
    the last one has the receipts, and `data: [DONE]` follows."""
    generations = await intake.submit(body, steering)
    writer = ChatWriter(new_id("chatcmpl"), body.model, service.fingerprint, generations, service.token_texts)
    return await _respond(writer, body, request)


@router.post(
    "/completions",
    summary="Continue texts",
    responses=declare(
        Completion,
        EXAMPLE_COMPLETION,
        *GENERATING,
        stream=CompletionChunk,
        events=[EXAMPLE_COMPLETION_CHUNK],
        ends_in=DONE,
    ),
)
async def completions(
    body: CompletionBody, request: Request, service: ServiceDep, intake: IntakeDep, steering: SteeringHeader = None
) -> Response:
    """Continue one or more texts under a steering. With `stream`, chunks are sent as server-sent events; the last one
    has the receipts, and `data: [DONE]` follows."""
    generations = await intake.submit(body, steering)
    texts = service.token_texts
    echoed = [texts.of_prompt(prompt) for prompt in body.prompt] if body.echo else None
    writer = CompletionWriter(new_id("cmpl"), body.model, service.fingerprint, generations, texts, echoed=echoed)
    return await _respond(writer, body, request)


@router.get(
    "/models",
    summary="List the models",
    response_model=None,
    responses=declare(ModelList, {"object": "list", "data": [EXAMPLE_MODEL, EXAMPLE_ALIAS]}, 503),
)
async def models(engine: EngineDep, registry: RegistryDep, service: ServiceDep, base: ModelNameDep) -> ModelList:
    """List the base model, then one alias per profile: the model steered by that profile at strength 1."""
    entry: ModelEntry = {
        "id": base,
        "object": "model",
        "created": service.created,
        "owned_by": "trimtab",
        "max_model_len": engine.info.context,
        "chat_template": chat_template_source(engine.info.tokenizer),
    }
    return {"object": "list", "data": [entry, *(_alias(entry, profile) for profile in registry.served)]}


@router.get(
    "/models/{model:path}",
    summary="Show one model",
    response_model=None,
    responses=declare(ModelEntry, EXAMPLE_ALIAS, 404, 503),
)
async def model(
    model: Annotated[str, Path(description="An `id` of the list.", examples=["demo:warm"])],
    engine: EngineDep,
    registry: RegistryDep,
    service: ServiceDep,
    base: ModelNameDep,
) -> ModelEntry:
    """Show one entry of the list."""
    listed = await models(engine, registry, service, base)
    for entry in listed["data"]:
        if entry["id"] == model:
            return entry
    raise UnknownModel(f"model {model!r} is not served; GET /v1/models lists what is", param="model")


def _alias(base: ModelEntry, profile: Profile) -> ModelEntry:
    name = base["id"]
    return {**base, "id": f"{name}:{profile.name}", "parent": name, "profile": profile.name, "version": profile.version}


async def _respond(writer: AnswerWriter[Whole, Part], body: OpenAIBody, request: Request) -> Response:
    if body.stream:
        chunks = writer.chunks(include_usage=body.include_usage)
        return EventStreamResponse(chunks, close=writer.generations.close, ends_in=DONE)
    return JSONResponse(writer.whole(await while_connected(request, writer.generations.results())))


@router.api_route("/responses", methods=["GET", "POST"], include_in_schema=False)
@router.api_route("/responses/{rest:path}", methods=["GET", "POST", "DELETE"], include_in_schema=False)
async def responses() -> Response:
    """OpenAI's newer API, which is not served."""
    raise UnknownRoute("the Responses API is not served here: use POST /v1/chat/completions")
