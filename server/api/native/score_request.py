"""The body of POST /score: given completions of one prompt."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from server.api.fields.body import Examples
from server.api.fields.prompts import OnePrompt, OnePromptBody
from server.api.fields.steering import Steering
from server.api.openai.requests import MOST_LOGPROBS
from server.generation.steering_grammar import HEADER, WantedSteering, parse_steering, refuse_two
from steering_vectors.errors import SteeringError

MOST_COMPLETIONS = 1024


class ScoreBody(OnePromptBody):
    """Steering holds from the last token of the prompt on, unless it says otherwise."""

    examples: ClassVar[Examples] = (
        {"prompt": "Bread is baked in", "completions": [" an oven.", " the sea."], "steering": "warm@0.8"},
    )

    completions: list[OnePrompt] = Field(
        min_length=1, max_length=MOST_COMPLETIONS, description="What follows the prompt, each a text or token ids."
    )
    steering: Steering | None = Field(None, description="What to steer by.")
    top_logprobs: int = Field(0, ge=0, le=MOST_LOGPROBS, description="So many of the likeliest tokens at each place.")

    def wanted_steering(self, header: str | None) -> WantedSteering:
        """Raises SteeringError where the field and the header both steer, and for a schedule: nothing is written."""
        field = None if self.steering is None else "the field steering"
        refuse_two(field, None if header is None else f"the header {HEADER}")
        if header is not None:
            return WantedSteering(parse_steering(header))
        wanted = WantedSteering() if self.steering is None else self.steering.wanted()
        if any(term.schedule is not None for term in wanted.terms):
            raise SteeringError(
                "given completions are scored under one steering: leave the schedule out", param="steering.schedule"
            )
        return wanted
