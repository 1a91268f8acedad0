"""The native routes that run generations: POST /generate, POST /compare and POST /score."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, NotRequired, cast

from fastapi import APIRouter, Depends, Request, Response
from pydantic import Field
from typing_extensions import TypedDict

from server.api.dependencies import IntakeDep, ReadyDep, SteeringHeader, refuse_steering_header
from server.api.document import GENERATING, declare
from server.api.fields.body import FAIL_FAST, OPENAI_NO_OPS, Examples, NoOps, Short
from server.api.fields.constraints import ConstrainedBody
from server.api.fields.prompts import OnePrompt, OnePromptBody
from server.api.fields.sampling import COMPLETION_TOKENS, SamplingBody, refuse_no_tokens
from server.api.fields.steering import ABOUT_USER, Steering
from server.api.openai.requests import MAX_LOGPROBS
from server.api.openai.responses import finite
from server.engines.protocol import Delta, Finished, GenerationRequest, PlanTerm, SamplingParameters, SteeringPlan
from server.generation.choices import Choice, Generations, Result
from server.generation.intake import Ask
from server.generation.receipts import Ending, Projections, Receipts, Usage, ending, receipt, usage
from server.generation.steering_grammar import EXAMPLE, only_one
from server.generation.token_texts import TokenTexts
from server.http.answers import about, json_answer
from server.http.middleware import StrictRoute
from server.http.sse import EventStreamResponse, while_connected
from steering_vectors.errors import SteeringError

MAX_VARIANTS = 8
MAX_COMPLETIONS = 1024

GenerationId = Annotated[str, about("The id of the generation; `PATCH /generations/{id}` takes it.", "gen-c9f0f895")]
Divergences = Annotated[
    list[float], about("With `kl`: KL(steered‖unsteered) in nats of the distribution of each token.", [0.01, 0.2])
]
VariantIndex = Annotated[int, about("The variant, from 0.", 0)]


class GenerateEnd(Ending):
    """The last event of a streamed text."""

    id: GenerationId
    usage: Annotated[Usage, about("Token counts.")]
    steering: Receipts


class GenerateAnswer(GenerateEnd):
    """The answer to POST /generate."""

    text: Annotated[str, about("The generated text.", "Mix flour, water and yeast.")]
    projections: NotRequired[Projections]


class GenerateDelta(TypedDict):
    """A piece of a streamed text. The first one is empty and sent at once."""

    id: GenerationId
    delta: Annotated[str, about("The next piece of text.", "Mix flour")]
    projections: NotRequired[Projections]


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


class ScoredAlternative(TypedDict):
    """A token that could have been at this position."""

    token: Annotated[str, about("The token's text.")]
    token_id: Annotated[int, about("Its id.")]
    logprob: Annotated[float, about("Its log-probability in nats.")]


class Score(TypedDict):
    """The log-probabilities of one completion, in lists of equal length."""

    tokens: Annotated[list[str], about("The tokens' texts.", [" oven"])]
    token_ids: Annotated[list[int], about("Their ids.", [512])]
    token_logprobs: Annotated[list[float], about("Their log-probabilities in nats.", [-0.7])]
    sum: Annotated[float, about("The sum of the log-probabilities.", -0.7)]
    top_logprobs: NotRequired[
        Annotated[list[list[ScoredAlternative]], about("The most likely tokens at each position, if requested.")]
    ]


class ScoreAnswer(TypedDict):
    """The answer to POST /score."""

    scores: Annotated[list[Score], about("In the order of the completions.")]
    usage: Annotated[Usage, about("Token counts; prompts and completions are both prompt tokens.")]
    steering: Receipts


class TextBody(SamplingBody, OnePromptBody):
    """The fields of the native routes that generate. A conversation has no default limit, a text OpenAI's."""

    no_ops: ClassVar[NoOps] = {
        **OPENAI_NO_OPS,
        "n": (1,),
        "stream_options": (),
        "logprobs": (False,),
        "top_logprobs": (0,),
        "echo": (False,),
    }

    user: Short | None = Field(None, description=ABOUT_USER)

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

    profile: Short | None = Field(
        None, description="One profile to steer by, NAME, NAME#SHA8 or NAME#ALIAS.", examples=["warm", "warm#fb09e9ae"]
    )
    strength: float | None = Field(None, description="The profile's strength, 1 by default.", examples=[0.8])
    steering: Steering | None = Field(
        None, description="A mix of profiles. Exclusive with `profile`.", examples=[EXAMPLE]
    )

    def ask(self, served: str, header: str | None) -> Ask:
        return Ask(
            (self.the_prompt(),),
            encoding=self.encoding(),
            plans={"steering" if self.profile is None else "profile": self._plan(header)},
            common=GenerationRequest((), (), self.sampling()),
            constraints=self.constraints(),
            projections=self.projections,
            timeout=self.timeout,
            max_tokens_field=self.max_tokens_field,
            user=self.user,
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
        }
        return only_one(sources, header)


class CompareBody(TextBody):
    """The body of POST /compare. All variants sample with the same random numbers."""

    examples: ClassVar[Examples] = (
        {"prompt": "Bread is", "variants": ["warm@0.8", {"profiles": []}], "max_tokens": 12, "kl": True, "seed": 7},
    )

    variants: Annotated[list[Steering], FAIL_FAST] = Field(
        min_length=1,
        max_length=MAX_VARIANTS,
        description="The steerings; one with an empty list of profiles is the unsteered model.",
    )
    kl: bool = Field(False, description="Report KL(steered‖unsteered) of each token's distribution, in nats.")

    def ask(self, served: str, header: str | None) -> Ask:
        return Ask(
            (self.the_prompt(),),
            encoding=self.encoding(),
            plans={f"variants[{place}]": variant.plan() for place, variant in enumerate(self.variants)},
            common=GenerationRequest((), (), self.sampling(), divergence=self.kl),
            projections=self.projections,
            counted="variants",
            timeout=self.timeout,
            max_tokens_field=self.max_tokens_field,
            user=self.user,
        )


class ScoreBody(OnePromptBody):
    """The body of POST /score. By default, steering applies from the last token of the prompt on."""

    examples: ClassVar[Examples] = (
        {"prompt": "Bread is baked in", "completions": [" an oven.", " the sea."], "steering": "warm@0.8"},
    )

    completions: Annotated[list[OnePrompt], FAIL_FAST] = Field(
        min_length=1, max_length=MAX_COMPLETIONS, description="The texts after the prompt, each a text or token ids."
    )
    steering: Steering | None = Field(None, description="The steering, without a schedule.")
    top_logprobs: int = Field(
        0, ge=0, le=MAX_LOGPROBS, description="The number of most likely tokens to list at each position."
    )

    def ask(self, served: str, header: str | None) -> Ask:
        plan = only_one({"the field steering": None if self.steering is None else self.steering.plan()}, header)
        if any(term.schedule is not None for term in plan.terms):
            raise SteeringError(
                "completions are scored under a constant steering: leave the schedule out", param="schedule"
            )
        return Ask(
            (self.the_prompt(),),
            encoding=self.encoding(),
            plans={"steering": plan},
            common=GenerationRequest((), (), SamplingParameters(max_tokens=0), prompt_logprobs=self.top_logprobs),
            completions=self.completions,
            counted="completions",
            timeout=self.timeout,
        )


router = APIRouter(route_class=StrictRoute)


@router.post(
    "/generate",
    tags=["native"],
    summary="Generate one text",
    **declare(GenerateAnswer, *GENERATING, stream=GenerateDelta | GenerateEnd),
)
async def generate(
    body: GenerateBody, request: Request, service: ReadyDep, intake: IntakeDep, steering: SteeringHeader = None
) -> Response:
    """Continue a text or a conversation under a steering. With `stream`, events have the pieces of the text, and the
    last one has everything else."""
    generations = await while_connected(request, intake.submit(body, steering))
    if body.stream:
        return EventStreamResponse(_events(generations, [{}]), close=generations.close)
    (result,) = await while_connected(request, generations.results())
    return await json_answer(lambda: _text(generations.choices[0], result), generations.values, service.encoding)


@router.post(
    "/compare",
    tags=["steering"],
    summary="Compare steerings of one prompt",
    dependencies=[Depends(refuse_steering_header)],
    **declare(CompareAnswer, *GENERATING, stream=CompareDelta | CompareEnd),
)
async def compare(body: CompareBody, request: Request, service: ReadyDep, intake: IntakeDep) -> Response:
    """Continue a text or a conversation under several steerings, with the same random numbers. With `stream`, the
    events of the variants are interleaved."""
    generations = await while_connected(request, intake.submit(body))
    if body.stream:
        numbers = [{"variant": index} for index in range(len(generations.choices))]
        return EventStreamResponse(_events(generations, numbers), close=generations.close)
    results = await while_connected(request, generations.results())

    def build() -> CompareAnswer:
        return {"variants": list(map(_text, generations.choices, results))}

    return await json_answer(build, generations.values, service.encoding)


@router.post("/score", tags=["native"], summary="Score given completions", **declare(ScoreAnswer, *GENERATING))
async def score(
    body: ScoreBody, request: Request, service: ReadyDep, intake: IntakeDep, steering: SteeringHeader = None
) -> Response:
    """Compute the log-probabilities, in nats, of each completion's tokens after the prompt."""
    generations = await while_connected(request, intake.submit(body, steering))
    results = await while_connected(request, generations.results())
    finished, texts = [result.finished for result in results], service.token_texts

    def build() -> ScoreAnswer:
        pairs = zip(generations.choices, results, strict=True)
        return {
            "scores": [_score(texts, choice.request, result) for choice, result in pairs],
            "usage": usage(finished),
            "steering": receipt(finished),
        }

    return await json_answer(build, generations.values, service.encoding)


def _text(choice: Choice, result: Result) -> CompareVariant:
    finished = result.finished
    end = {**ending(finished), "usage": usage([finished]), "steering": receipt([finished])}
    answer = cast(CompareVariant, {"id": choice.id, "text": result.text, **end})
    if choice.request.projections:
        answer["projections"] = choice.by_profile(result.projections)
    if choice.request.divergence:
        answer["kl"] = list(result.divergences)
    return answer


async def _events(generations: Generations, marks: Sequence[Mapping[str, int]]) -> AsyncIterator[Mapping[str, Any]]:
    """The events of all choices as they come; `marks` has what each choice's events carry besides their own fields."""
    choices = generations.choices
    for choice, mark in zip(choices, marks, strict=True):
        yield {"id": choice.id, "delta": "", **mark}  # at once, for the ids
    async for index, event in generations.events():
        choice, mark = choices[index], marks[index]
        if isinstance(event, Finished):
            end = {**ending(event), "usage": usage([event]), "steering": receipt([event])}
            yield {"id": choice.id, **end, **mark}
        elif isinstance(event, Delta) and (event.text or event.divergences or event.projections):
            piece: dict[str, Any] = {"id": choice.id, "delta": event.text, **mark}
            if event.divergences:
                piece["kl"] = list(event.divergences)
            if event.projections:
                piece["projections"] = choice.by_profile(event.projections)
            yield piece


def _score(texts: TokenTexts, request: GenerationRequest, result: Result) -> Score:
    scored = result.prompt_logprobs[-request.scored_suffix :]
    logprobs = [finite(one.logprob) for one in scored]
    score: Score = {
        "tokens": [texts.text_of(one.token_id) for one in scored],
        "token_ids": [one.token_id for one in scored],
        "token_logprobs": logprobs,
        "sum": sum(logprobs),
    }
    if request.prompt_logprobs:
        score["top_logprobs"] = [
            [
                {"token": texts.text_of(token_id), "token_id": token_id, "logprob": finite(logprob)}
                for token_id, logprob in one.top
            ]
            for one in scored
        ]
    return score
