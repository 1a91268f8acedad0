"""OpenAI's routes: chat completions, completions and models."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from server.api.dependencies import IntakeDep, ReadyDep, SteeringHeader
from server.api.document import GENERATING, declare
from server.api.openai.requests import ChatBody, CompletionBody, OpenAIBody
from server.api.openai.responses import (
    AnswerWriter,
    ChatChunk,
    ChatCompletion,
    ChatWriter,
    Completion,
    CompletionChunk,
    CompletionWriter,
    ModelEntry,
    ModelList,
)
from server.engines.errors import UnknownModel, UnknownRoute
from server.generation.intake import new_id
from server.http.answers import json_answer
from server.http.middleware import StrictRoute
from server.http.sse import DONE, EventStreamResponse, while_connected
from server.state import Service
from steering_vectors.data.chat import chat_template_source

router = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=StrictRoute)


@router.post(
    "/chat/completions",
    summary="Reply in a conversation",
    **declare(ChatCompletion, *GENERATING, stream=ChatChunk, ends_in=DONE),
)
async def chat_completions(
    body: ChatBody, request: Request, service: ReadyDep, intake: IntakeDep, steering: SteeringHeader = None
) -> Response:
    """Generate the next turn of a conversation under a steering. With `stream`, chunks are sent as server-sent events;
    the last one has the receipts, and `data: [DONE]` follows."""
    generations = await while_connected(request, intake.submit(body, steering))
    writer = ChatWriter(new_id("chatcmpl"), body.model, service.fingerprint, generations, service.token_texts)
    return await _respond(writer, body, request, service)


@router.post(
    "/completions", summary="Continue texts", **declare(Completion, *GENERATING, stream=CompletionChunk, ends_in=DONE)
)
async def completions(
    body: CompletionBody, request: Request, service: ReadyDep, intake: IntakeDep, steering: SteeringHeader = None
) -> Response:
    """Continue one or more texts under a steering. With `stream`, chunks are sent as server-sent events; the last one
    has the receipts, and `data: [DONE]` follows."""
    generations = await while_connected(request, intake.submit(body, steering))
    texts = service.token_texts
    echoed = [texts.of_prompt(prompt) for prompt in body.prompt] if body.echo else None
    writer = CompletionWriter(new_id("cmpl"), body.model, service.fingerprint, generations, texts, echoed=echoed)
    return await _respond(writer, body, request, service)


async def _respond(writer: AnswerWriter, body: OpenAIBody, request: Request, service: Service) -> Response:
    if writer.generations.keeping is not None:
        writer.generations.keeping.answer_id = writer.id
    if body.stream:
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        chunks = writer.chunks(include_usage=include_usage)
        return EventStreamResponse(chunks, close=writer.generations.close, ends_in=DONE)
    results = await while_connected(request, writer.generations.results())
    return await json_answer(lambda: writer.whole(results), writer.generations.values, service.encoding)


@router.get("/models", summary="List the models", **declare(ModelList, 503))
async def models(service: ReadyDep) -> ModelList:
    """List the base model, then one alias per profile: the model steered by that profile at strength 1."""
    base = service.model_name
    entry: ModelEntry = {
        "id": base,
        "object": "model",
        "created": service.created,
        "owned_by": "trimtab",
        "max_model_len": service.engine.info.context,
        "chat_template": chat_template_source(service.engine.info.tokenizer),
    }
    aliases: list[ModelEntry] = [
        {**entry, "id": f"{base}:{one.name}", "parent": base, "profile": one.name, "version": one.version}
        for one in service.registry.served
    ]
    return {"object": "list", "data": [entry, *aliases]}


@router.get("/models/{model:path}", summary="Show one model", **declare(ModelEntry, 404, 503))
async def model(
    model: Annotated[str, Path(description="An `id` of the list.", examples=["demo:warm"])], service: ReadyDep
) -> ModelEntry:
    """Show one entry of the list."""
    for entry in (await models(service))["data"]:
        if entry["id"] == model:
            return entry
    raise UnknownModel(f"model {model!r} is not served; GET /v1/models lists what is", param="model")


@router.api_route("/responses", methods=["GET", "POST"], include_in_schema=False)
@router.api_route("/responses/{rest:path}", methods=["GET", "POST", "DELETE"], include_in_schema=False)
async def responses() -> Response:
    """OpenAI's newer API, which is not served."""
    raise UnknownRoute("the Responses API is not served here: use POST /v1/chat/completions")
