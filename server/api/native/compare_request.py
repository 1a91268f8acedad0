"""The body of POST /compare: one prompt under several steerings."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from server.api.fields.body import Examples, NoOps
from server.api.fields.prompts import OnePromptBody, ProjectionsBody
from server.api.fields.sampling import SamplingBody
from server.api.fields.steering import Steering
from server.api.native.generate_request import NATIVE_NO_OPS
from server.api.openai.requests import COMPLETION_TOKENS, refuse_no_tokens
from server.engines.protocol import SamplingParameters

MOST_VARIANTS = 8


class CompareBody(SamplingBody, OnePromptBody, ProjectionsBody):
    """Every variant draws with the same random numbers."""

    no_ops: ClassVar[NoOps] = NATIVE_NO_OPS
    examples: ClassVar[Examples] = (
        {"prompt": "Bread is", "variants": ["warm@0.8", {"profiles": []}], "max_tokens": 12, "kl": True, "seed": 7},
    )

    variants: list[Steering] = Field(
        min_length=1,
        max_length=MOST_VARIANTS,
        description="The steerings; one with an empty list of profiles is the untouched model.",
    )
    kl: bool = Field(False, description="Tell each token's KL(steered‖unsteered) in nats, on the variant's own text.")
    stream: bool = Field(False, description="Answer with server-sent events, interleaved as they come.")

    def sampling(self, default_max_tokens: int | None = None) -> SamplingParameters:
        return refuse_no_tokens(super().sampling(COMPLETION_TOKENS if self.messages is None else default_max_tokens))
