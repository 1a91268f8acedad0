"""What the routes about steering answer, for the OpenAPI document. `answers` says what holds them to it."""

from __future__ import annotations

from pydantic import Field

from server.api.fields.answers import APPLIED, RECEIPT, USAGE, Answer, SteeringReceipt, Usage
from server.api.native.responses import ENDING, GenerateAnswer, GenerateEvent

KL = "KL(steered‖unsteered) in nats of the distribution each token was drawn from, where `kl` was asked for."


class CompareVariant(GenerateAnswer):
    """The text of one variant."""

    kl: list[float] = Field([], description=KL)


class CompareAnswer(Answer):
    """The answer to POST /compare."""

    examples = ({"variants": [{"id": "gen-c9f0f895", "text": "Mix flour, dear.", "kl": [0.01, 0.2], **ENDING}]},)

    variants: list[CompareVariant] = Field(description="In the order in which they were asked for.")


class CompareEvent(GenerateEvent):
    """One event of a streamed comparison."""

    examples = (
        {"variant": 0, "id": "gen-c9f0f895", "delta": "Mix flour"},
        {"variant": 0, "id": "gen-c9f0f895", **ENDING},
    )

    variant: int = Field(description="Which variant, from 0.")
    kl: list[float] = Field([], description=KL)


class ScoredAlternative(Answer):
    """A token that might have stood there."""

    token: str = Field(description="Its text.")
    token_id: int = Field(description="Its id.")
    logprob: float = Field(description="Its log-probability in nats.")


class Score(Answer):
    """How likely one completion is: lists of one length."""

    tokens: list[str] = Field(description="The tokens' texts.")
    token_ids: list[int] = Field(description="Their ids.")
    token_logprobs: list[float] = Field(description="Their log-probabilities in nats.")
    sum: float = Field(description="Of all of them together.")
    top_logprobs: list[list[ScoredAlternative]] = Field([], description="The likeliest at each place, if asked for.")


class ScoreAnswer(Answer):
    """The answer to POST /score."""

    examples = (
        {
            "scores": [{"tokens": [" oven"], "token_ids": [512], "token_logprobs": [-0.7], "sum": -0.7}],
            "usage": USAGE,
            "steering": [RECEIPT],
        },
    )

    scores: list[Score] = Field(description="In the order of the completions.")
    usage: Usage = Field(description="Tokens read, prompts and completions together.")
    steering: list[SteeringReceipt] = Field(description=APPLIED)


class ChangeAnswer(Answer):
    """The answer to PATCH /generations/{id}."""

    examples = ({"id": "gen-c9f0f895", "from_token": 17, "position": 31, "steering": [RECEIPT]},)

    id: str = Field(description="The generation.")
    from_token: int = Field(description="The first token of the completion that is drawn under the new steering.")
    position: int = Field(description="The first position, in prompt and completion, that is computed under it.")
    steering: list[SteeringReceipt] = Field(description="What holds from there on.")


class ResolvedProfile(SteeringReceipt):
    """One profile of the mix."""

    examples = ({**RECEIPT, "method": "mean-diff", "unit": 4.6, "max_strength": 1.7, "kl_at_1": 0.1},)

    method: str = Field(description="How the profile was made.")
    unit: float = Field(description="The factor from strength to shift.")
    max_strength: float = Field(description="Its safe range.")
    kl_at_1: float | None = Field(description="What strength 1 costs in nats per token; null if never calibrated.")


class ResolvedBlock(Answer):
    """How far the whole mix shifts one block."""

    block: int = Field(description="The block.")
    shift_norm: float = Field(description="The norm of the shift.")
    residual_norm: float | None = Field(description="The usual norm of the residual stream there, if it is known.")
    norm_ratio: float | None = Field(description="The one over the other.")


class ResolvedPoint(Answer):
    """The mix from one token on."""

    from_token: int = Field(description="The first token of the completion.")
    strengths: dict[str, float] = Field(description="By profile.")


class ResolveAnswer(Answer):
    """The answer to POST /steering/resolve."""

    examples = (
        {
            "steering": [ResolvedProfile.examples[0]],
            "blocks": [{"block": 5, "shift_norm": 48.0, "residual_norm": 129.4, "norm_ratio": 0.37}],
        },
    )

    steering: list[ResolvedProfile] = Field(description="The mix at the start.")
    blocks: list[ResolvedBlock] = Field(description="The blocks that it shifts.")
    timeline: list[ResolvedPoint] = Field([], description="Where it changes, for a schedule.")
