"""POST /score: how likely given completions are, under a steering."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from server.api.dependencies import ServiceDep, SteeringHeader
from server.api.document import declare
from server.api.native.score_request import ScoreBody
from server.api.native.steering_responses import ScoreAnswer
from server.api.openai.building import usage
from server.api.openai.logprob_objects import finite
from server.engines.protocol import GenerationRequest, SamplingParameters, TokenLogprob
from server.generation.choices import Generations, Result, new_id
from server.generation.encoding import check_completions, encode_continuations, naming_field
from server.generation.receipts import receipt
from server.generation.token_texts import TokenTexts
from server.http.json_bodies import StrictRoute
from server.http.sse import while_connected
from server.state import Service

router = APIRouter(tags=["native"], route_class=StrictRoute)
NOTHING_WRITTEN = SamplingParameters(max_tokens=0)


@router.post("/score", summary="Score given completions", responses=declare(ScoreAnswer, 400, 404, 429, 503))
async def score(body: ScoreBody, request: Request, service: ServiceDep, steering: SteeringHeader = None) -> Response:
    """Log-probabilities in nats of each completion's tokens after the prompt."""
    generations = await _start(body, service, steering)
    results = await while_connected(request, generations.results())
    finished = [result.finished for result in results]
    scores = [
        _score(service.token_texts, one, result) for one, result in zip(generations.requests, results, strict=True)
    ]
    return JSONResponse({"scores": scores, "usage": usage(finished), "steering": receipt(finished)})


async def _start(body: ScoreBody, service: Service, header: str | None) -> Generations:
    engine = service.engine
    wanted = body.wanted_steering(header)
    mixture = wanted.resolve(service.registry.find)
    tokenizer = engine.language_model.tokenizer
    given = body.the_prompt()
    prompt, completions = await encode_continuations(tokenizer, given, body.completions, body)
    check_completions(completions, engine.language_model.vocab_size)
    requests = [
        GenerationRequest(
            new_id("score"),
            (*prompt, *completion),
            NOTHING_WRITTEN,
            mixture,
            prompt_logprobs=body.top_logprobs,
            given=len(completion),
        )
        for completion in completions
    ]
    with naming_field(given):
        return await Generations.run(engine, requests, most=service.most_generations, param="completions")


def _score(texts: TokenTexts, request: GenerationRequest, result: Result) -> dict[str, Any]:
    told = result.prompt_logprobs[-request.given :]
    answer: dict[str, Any] = {
        "tokens": [texts.text_of(one.token_id) for one in told],
        "token_ids": [one.token_id for one in told],
        "token_logprobs": [finite(one.logprob) for one in told],
        "sum": sum(finite(one.logprob) for one in told),
    }
    if request.prompt_logprobs:
        answer["top_logprobs"] = [_alternatives(texts, one) for one in told]
    return answer


def _alternatives(texts: TokenTexts, one: TokenLogprob) -> list[dict[str, Any]]:
    return [
        {"token": texts.text_of(token_id), "token_id": token_id, "logprob": finite(logprob)}
        for token_id, logprob in one.top
    ]
