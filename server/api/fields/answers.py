"""What clients receive, as pydantic models that describe it in the OpenAPI document.

Answers are written as plain dictionaries (`server.api.openai.building`) and never pass through these models; tests hold
both together. Owns what all answers share: receipts, usage and the error object.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from steering_vectors.profiles.profile import ApplyTo, Operator

FinishReason = Literal["stop", "length"]

FINISH = "Why it ended: `stop` at an end-of-sequence token or a stop, `length` at a limit of tokens."
STOP = "The stop string or stop token id that ended it; null for an end-of-sequence token and for `length`."
PROJECTIONS = "By profile, one number for each token: how far the residual stream points along it, if asked for."
APPLIED = "What was applied, one entry per profile; empty where nothing steered."


def _without_defaults(schema: dict[str, Any]) -> None:
    """A field with a default is one that may be absent, and then it says nothing."""
    for field in schema.get("properties", {}).values():
        field.pop("default", None)


class Answer(BaseModel):
    """The form of an answer. `examples` are whole ones."""

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra=_without_defaults)
    examples: ClassVar[Sequence[Mapping[str, Any]]] = ()


RECEIPT = {
    "name": "warm",
    "version": "fb09e9ae0f85d2a0d9b41ff2bb16eba63945a3e2bb08ba0ce36ab2f7023dfc8b",
    "strength": 0.8,
    "operator": "add",
    "layers": [5],
    "apply_to": "generated",
    "steered_tokens": 24,
    "calibrated": True,
}
USAGE = {
    "prompt_tokens": 12,
    "completion_tokens": 24,
    "total_tokens": 36,
    "prompt_tokens_details": {"cached_tokens": 0},
}


class GateReceipt(Answer):
    """What a prompt decided about a profile with a gate."""

    opened: bool = Field(description="Whether the profile steered.")
    similarity: float | None = Field(description="The prompt's similarity to the condition; null if it was too short.")


class StrengthPoint(Answer):
    """A strength, and from where it held."""

    from_token: int = Field(description="The first token of the completion drawn under it.")
    strength: float = Field(description="The strength; 0 while the profile was not named.")


class SteeringReceipt(Answer):
    """What one profile did to an answer."""

    examples = (RECEIPT,)

    name: str = Field(description="The profile.")
    version: str = Field(description="The sha256 of its file: exactly which vectors were applied.")
    strength: float = Field(description="The strength asked for, and applied.")
    operator: Operator = Field(description="`add` shifts the residual stream, `ablate` takes a direction out of it.")
    layers: list[int] = Field(description="The blocks that were steered; empty at strength 0.")
    apply_to: ApplyTo = Field(description="`generated`: from the last prompt token on; `all`: the prompt too.")
    steered_tokens: int = Field(description="At how many positions; 0 at strength 0.")
    calibrated: bool = Field(description="Whether the profile was used as it was calibrated, so that its KL holds.")
    preserve_norm: Literal[True] = Field(True, description="Present if the norm of steered residuals was kept.")
    allow_beyond_safe: Literal[True] = Field(True, description="Present if the safe range was waived.")
    gate: GateReceipt | None = Field(None, description="Present for a profile with a gate: what the prompt decided.")
    timeline: list[StrengthPoint] = Field([], description="Present if the steering changed on the way.")


class PromptTokensDetails(Answer):
    """Of the prompt's tokens."""

    cached_tokens: int = Field(description="How many of them were not computed again.")


class Usage(Answer):
    """Tokens read and written. A prompt counts once for all of its choices."""

    examples = (USAGE,)

    prompt_tokens: int = Field(description="Tokens of the prompts.")
    completion_tokens: int = Field(description="Tokens written, over all choices.")
    total_tokens: int = Field(description="Both together.")
    prompt_tokens_details: PromptTokensDetails = Field(description="What of the prompt was reused.")


class ErrorDetail(Answer):
    """What is wrong, and what to do."""

    message: str = Field(description="What is wrong and what to do, for people.")
    type: Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"] = Field(
        description="The kind of error, in OpenAI's words."
    )
    param: str | None = Field(description="The field that is wrong, as in `steering.profiles[0].name`.")
    code: str | None = Field(description="A stable word for programs.")


class ErrorAnswer(Answer):
    """OpenAI's error object. A stream that fails on its way has it as its last event, before any `[DONE]`."""

    error: ErrorDetail = Field(description="The error.")
