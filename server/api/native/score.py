"""POST /score: how likely given completions are, under a steering."""

from __future__ import annotations

from typing import Annotated, ClassVar, NotRequired

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field
from typing_extensions import TypedDict

from server.api.dependencies import IntakeDep, ServiceDep, SteeringHeader
from server.api.document import GENERATING, declare
from server.api.fields.body import Examples
from server.api.fields.prompts import OnePrompt, OnePromptBody
from server.api.fields.steering import Steering
from server.api.openai.requests import MAX_LOGPROBS
from server.api.openai.responses import finite
from server.engines.protocol import GenerationRequest, SteeringPlan, TokenLogprob
from server.generation.choices import Result
from server.generation.intake import Ask
from server.generation.receipts import EXAMPLE_RECEIPT, EXAMPLE_USAGE, Receipts, Usage, receipt, usage
from server.generation.steering_grammar import HEADER, of_header, only_one
from server.generation.token_texts import TokenTexts
from server.http.answers import about
from server.http.json_bodies import StrictRoute
from server.http.sse import while_connected
from steering_vectors.errors import SteeringError

MAX_COMPLETIONS = 1024


class ScoredAlternative(TypedDict):
    """A token that could have been at this position."""

    token: Annotated[str, about("The token's text.")]
    token_id: Annotated[int, about("Its id.")]
    logprob: Annotated[float, about("Its log-probability in nats.")]


class Score(TypedDict):
    """The log-probabilities of one completion, in lists of equal length."""

    tokens: Annotated[list[str], about("The tokens' texts.")]
    token_ids: Annotated[list[int], about("Their ids.")]
    token_logprobs: Annotated[list[float], about("Their log-probabilities in nats.")]
    sum: Annotated[float, about("The sum of the log-probabilities.")]
    top_logprobs: NotRequired[
        Annotated[list[list[ScoredAlternative]], about("The most likely tokens at each position, if requested.")]
    ]


class ScoreAnswer(TypedDict):
    """The answer to POST /score."""

    scores: Annotated[list[Score], about("In the order of the completions.")]
    usage: Annotated[Usage, about("Token counts; prompts and completions are both prompt tokens.")]
    steering: Receipts


EXAMPLE_SCORES: ScoreAnswer = {
    "scores": [{"tokens": [" oven"], "token_ids": [512], "token_logprobs": [-0.7], "sum": -0.7}],
    "usage": EXAMPLE_USAGE,
    "steering": [EXAMPLE_RECEIPT],
}


class ScoreBody(OnePromptBody):
    """The body of POST /score. By default, steering applies from the last token of the prompt on."""

    examples: ClassVar[Examples] = (
        {"prompt": "Bread is baked in", "completions": [" an oven.", " the sea."], "steering": "warm@0.8"},
    )

    completions: list[OnePrompt] = Field(
        min_length=1, max_length=MAX_COMPLETIONS, description="The texts after the prompt, each a text or token ids."
    )
    steering: Steering | None = Field(None, description="The steering, without a schedule.")
    top_logprobs: int = Field(
        0, ge=0, le=MAX_LOGPROBS, description="The number of most likely tokens to list at each position."
    )

    def ask(self, served: str, header: str | None) -> Ask:
        field = None if self.steering is None else self.steering.plan()
        plan = only_one({"the field steering": field, f"the header {HEADER}": of_header(header)}) or SteeringPlan()
        if any(term.schedule is not None for term in plan.terms):
            raise SteeringError(
                "completions are scored under a constant steering: leave the schedule out", param="schedule"
            )
        return Ask(
            (self.the_prompt(),),
            encoding=self,
            plans={"steering": plan},
            completions=self.completions,
            prompt_logprobs=self.top_logprobs,
            counted="completions",
        )


router = APIRouter(tags=["native"], route_class=StrictRoute)


@router.post("/score", summary="Score given completions", responses=declare(ScoreAnswer, EXAMPLE_SCORES, *GENERATING))
async def score(
    body: ScoreBody, request: Request, service: ServiceDep, intake: IntakeDep, steering: SteeringHeader = None
) -> Response:
    """Compute the log-probabilities, in nats, of each completion's tokens after the prompt."""
    generations = await intake.submit(body, steering)
    results = await while_connected(request, generations.results())
    finished = [result.finished for result in results]
    pairs = zip(generations.choices, results, strict=True)
    answer: ScoreAnswer = {
        "scores": [_score(service.token_texts, choice.request, result) for choice, result in pairs],
        "usage": usage(finished),
        "steering": receipt(finished),
    }
    return JSONResponse(answer)


def _score(texts: TokenTexts, request: GenerationRequest, result: Result) -> Score:
    scored = result.prompt_logprobs[-request.scored_suffix :]
    score: Score = {
        "tokens": [texts.text_of(one.token_id) for one in scored],
        "token_ids": [one.token_id for one in scored],
        "token_logprobs": [finite(one.logprob) for one in scored],
        "sum": sum(finite(one.logprob) for one in scored),
    }
    if request.prompt_logprobs:
        score["top_logprobs"] = [_alternatives(texts, one) for one in scored]
    return score


def _alternatives(texts: TokenTexts, one: TokenLogprob) -> list[ScoredAlternative]:
    return [
        {"token": texts.text_of(token_id), "token_id": token_id, "logprob": finite(logprob)}
        for token_id, logprob in one.top
    ]
