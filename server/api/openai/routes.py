"""OpenAI's routes: chat completions, completions and the list of models."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import JSONResponse

from server.api.dependencies import EngineDep, ModelNameDep, RegistryDep, ReporterDep, ServiceDep, SteeringHeader
from server.api.document import declare
from server.api.fields.prompts import messages_of
from server.api.openai.building import ChatAnswer, CompletionAnswer, OpenAIAnswer
from server.api.openai.requests import ChatBody, CompletionBody, OpenAIBody
from server.api.openai.responses import ChatChunk, ChatCompletion, Completion, CompletionChunk, ModelEntry, ModelList
from server.engines.protocol import Finished
from server.generation.choices import Generations, new_id
from server.generation.encoding import Prompt, echo, encode, naming_field
from server.http.error_responses import ErrorReporter
from server.http.json_bodies import StrictRoute
from server.http.sse import DONE, LAST, EventStreamResponse, frame, while_connected
from server.state import Service
from steering_vectors.data.chat import chat_template_source
from steering_vectors.errors import UnknownModel, UnknownRoute
from steering_vectors.profiles.profile import Profile

router = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=StrictRoute)


@router.post(
    "/chat/completions",
    summary="Reply in a conversation",
    responses=declare(ChatCompletion, 400, 404, 429, 503, stream=ChatChunk, ends_in=LAST),
)
async def chat_completions(
    body: ChatBody, request: Request, service: ServiceDep, reporter: ReporterDep, steering: SteeringHeader = None
) -> Response:
    """Write the next turn of a conversation, steered as asked. With `stream`, chunks come as server-sent events, the
    very last one with the receipt, and then `data: [DONE]`."""
    prompts = [messages_of(body.messages)]
    generations, described = await _start(body, prompts, steering, service)
    answer = ChatAnswer(id=new_id("chatcmpl"), **described)
    return await _respond(answer, generations, body, request, reporter)


@router.post(
    "/completions",
    summary="Continue texts",
    responses=declare(Completion, 400, 404, 429, 503, stream=CompletionChunk, ends_in=LAST),
)
async def completions(
    body: CompletionBody, request: Request, service: ServiceDep, reporter: ReporterDep, steering: SteeringHeader = None
) -> Response:
    """Continue one text or several, steered as asked. With `stream`, chunks come as server-sent events, the very last
    one with the receipt, and then `data: [DONE]`."""
    generations, described = await _start(body, body.prompt, steering, service)
    echoed = [echo(service.engine.language_model.tokenizer, one) for one in body.prompt] if body.echo else None
    answer = CompletionAnswer(id=new_id("cmpl"), **described, echoed=echoed)
    return await _respond(answer, generations, body, request, reporter)


@router.get("/models", summary="List the models", response_model=None, responses=declare(ModelList, 503))
async def models(engine: EngineDep, registry: RegistryDep, service: ServiceDep, base: ModelNameDep) -> dict[str, Any]:
    """The base model, then one alias for each profile: the model steered by that profile at strength 1."""
    template = chat_template_source(engine.language_model.tokenizer)
    common = {"object": "model", "created": service.created, "owned_by": "trimtab"}
    common |= {"max_model_len": engine.context, "chat_template": template}
    aliases = [{"id": f"{base}:{profile.name}", **common, **_origin(base, profile)} for profile in registry.served]
    return {"object": "list", "data": [{"id": base, **common}, *aliases]}


@router.get(
    "/models/{model:path}", summary="Show one model", response_model=None, responses=declare(ModelEntry, 404, 503)
)
async def model(
    model: Annotated[str, Path(description="An `id` of the list.", examples=["demo:warm"])],
    engine: EngineDep,
    registry: RegistryDep,
    service: ServiceDep,
    base: ModelNameDep,
) -> dict[str, Any]:
    """One entry of the list, the base model or an alias."""
    listed = await models(engine, registry, service, base)
    for entry in listed["data"]:
        if entry["id"] == model:
            return dict(entry)
    raise UnknownModel(f"model {model!r} is not served; GET /v1/models lists what is", param="model")


def _origin(base: str, profile: Profile) -> dict[str, str]:
    return {"parent": base, "profile": profile.name, "version": profile.version}


async def _start(
    body: OpenAIBody, prompts: Sequence[Prompt], header: str | None, service: Service
) -> tuple[Generations, dict[str, Any]]:
    """Hand every choice to the engine, so that what is wrong with a request is said before the answer begins; and
    what all answers are made of."""
    engine, most = service.engine, service.most_generations
    timeline = body.wanted_steering(service.model_name, header).timeline(service.registry.find)
    sampling, constraint, logprobs = body.sampling(), body.constraint(), body.most_likely
    body.check_stream_options()
    scored = logprobs if body.echoes else None
    with naming_field(prompts[0]):
        generations = await Generations.start(
            engine,
            [await encode(engine.language_model.tokenizer, prompt, body) for prompt in prompts],
            sampling,
            timeline,
            n=body.n,
            most=most,
            logprobs=logprobs,
            prompt_logprobs=scored,
            projections=body.projections,
            constraint=constraint,
        )
    return generations, {
        "model": body.model,
        "fingerprint": service.fingerprint,
        "requests": generations.requests,
        "texts": service.token_texts,
        "n": body.n,
    }


async def _respond(
    answer: OpenAIAnswer, generations: Generations, body: OpenAIBody, request: Request, reporter: ErrorReporter
) -> Response:
    if body.stream:
        frames = _frames(answer, generations, reporter, include_usage=body.include_usage)
        return EventStreamResponse(frames, close=generations.close)
    results = await while_connected(request, generations.results())
    return JSONResponse(answer.whole(results))


async def _frames(
    answer: OpenAIAnswer, generations: Generations, reporter: ErrorReporter, *, include_usage: bool
) -> AsyncIterator[bytes]:
    try:
        async for chunk in _chunks(answer, generations, include_usage=include_usage):
            yield frame(chunk)
    except Exception as error:
        yield frame(reporter.describe(error))
    yield DONE


async def _chunks(
    answer: OpenAIAnswer, generations: Generations, *, include_usage: bool
) -> AsyncIterator[dict[str, Any]]:
    """The chunks of all choices as they come; the very last one carries the receipt of the whole."""
    ends: dict[int, Finished] = {}
    for index in range(len(generations)):
        yield answer.opening(index)
    async for index, event in generations.events():
        if isinstance(event, Finished):
            ends[index] = event
            last = len(ends) == len(generations) and not include_usage
            closing = answer.closing(index, event)
            yield answer.with_receipt(closing, list(ends.values())) if last else closing
        elif (chunk := answer.piece(index, event)) is not None:
            yield chunk
    if include_usage:
        finished = [ends[index] for index in range(len(generations))]
        yield answer.with_receipt(answer.usage_chunk(finished), finished)


@router.api_route("/responses", methods=["GET", "POST"], include_in_schema=False)
@router.api_route("/responses/{rest:path}", methods=["GET", "POST", "DELETE"], include_in_schema=False)
async def responses() -> Response:
    """OpenAI's newer route, which keeps conversations: not served."""
    raise UnknownRoute("the Responses API is not served here: use POST /v1/chat/completions")
