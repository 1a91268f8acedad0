"""The body of POST /generate, the short form."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from server.api.fields.body import Examples, NoOps
from server.api.fields.constraints import ConstrainedBody
from server.api.fields.prompts import OnePromptBody, ProjectionsBody
from server.api.fields.steering import Steering
from server.api.fields.unsupported import NO_OPS
from server.api.openai.requests import COMPLETION_TOKENS, refuse_no_tokens
from server.engines.protocol import SamplingParameters
from server.generation.steering_grammar import EXAMPLE, HEADER, WantedSteering, WantedTerm, parse_steering, refuse_two
from steering_vectors.errors import SteeringError

NATIVE_NO_OPS: NoOps = {
    **NO_OPS, "n": (1,), "stream_options": (), "logprobs": (False,), "top_logprobs": (0,), "echo": (False,)
}  # fmt: skip


class GenerateBody(ConstrainedBody, OnePromptBody, ProjectionsBody):
    """One prompt, or one conversation; one answer."""

    no_ops: ClassVar[NoOps] = NATIVE_NO_OPS
    examples: ClassVar[Examples] = (
        {
            "messages": [{"role": "user", "content": "How do I bake bread?"}],
            "profile": "warm",
            "strength": 0.8,
            "max_tokens": 60,
            "seed": 7,
        },
    )

    profile: str | None = Field(
        None, description="One profile to steer by, NAME or NAME#SHA8.", examples=["warm", "warm#fb09e9ae"]
    )
    strength: float | None = Field(None, description="Its strength, 1 if absent.", examples=[0.8])
    steering: Steering | None = Field(
        None, description="A mix of profiles. Either this or profile.", examples=[EXAMPLE]
    )
    stream: bool = Field(False, description="Answer with server-sent events.")

    def sampling(self, default_max_tokens: int | None = None) -> SamplingParameters:
        return refuse_no_tokens(super().sampling(COMPLETION_TOKENS if self.messages is None else default_max_tokens))

    def wanted_steering(self, header: str | None) -> WantedSteering:
        """Raises SteeringError where the three steering fields contradict each other, or the header is one more."""
        field = "profile" if self.profile is not None else "steering" if self.steering is not None else None
        refuse_two(None if field is None else f"the field {field}", None if header is None else f"the header {HEADER}")
        if self.strength is not None and self.profile is None:
            raise SteeringError("strength is given without profile: name the profile it is for", param="strength")
        if self.profile is not None and self.steering is not None:
            raise SteeringError("profile and steering are both given: use only one of them", param="steering")
        if self.profile is not None:
            return WantedSteering((WantedTerm(self.profile, 1.0 if self.strength is None else self.strength),))
        if header is not None:
            return WantedSteering(parse_steering(header))
        return self.steering.wanted() if self.steering is not None else WantedSteering()
