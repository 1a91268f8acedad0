"""The sampling fields, the same for every route.

Types are checked here, ranges by `SamplingParameters`, and token ids against the vocabulary by the engine.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated

from pydantic import BeforeValidator, Field

from server.api.fields.body import FAIL_FAST, Body, OrElse, Short, at_most
from server.engines.protocol import SamplingParameters
from steering_vectors.errors import RequestError

MAX_STOPS = 16
MAX_TOKENS_NAMED = 1024  # by logit_bias or stop_token_ids
COMPLETION_TOKENS = 16  # OpenAI's default
SEED_LIMIT = 2**63


StopStrings = Annotated[
    list[Short],
    Field(max_length=MAX_STOPS, fail_fast=True),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    OrElse({"type": "string", "minLength": 1}),
]
TokenId = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


class SamplingBody(Body):
    """What every route that generates has: OpenAI's sampling fields, vLLM's where OpenAI has none, and how to answer.
    Defaults are OpenAI's."""

    temperature: float = Field(1.0, description="Sampling temperature; 0 is greedy.")
    top_p: float = Field(1.0, description="Sample from the most likely tokens with this cumulative probability.")
    top_k: int = Field(0, ge=-1, description="Sample from this many of the most likely tokens; 0 or -1 is all.")
    min_p: float = Field(0.0, description="Minimum probability of a token, relative to the most likely one.")
    repetition_penalty: float = Field(
        1.0, description="Penalizes tokens that occur in the prompt or the completion, as a factor on their logits."
    )
    presence_penalty: float = Field(
        0.0, description="Penalizes tokens that occur in the completion: subtracted from their logits."
    )
    frequency_penalty: float = Field(
        0.0, description="Penalizes tokens for each time they occur in the completion: subtracted from their logits."
    )
    logit_bias: Annotated[dict[TokenId, Bias], BeforeValidator(at_most(MAX_TOKENS_NAMED))] = Field(
        default_factory=dict, description="Added to the logits of tokens, by token id.", examples=[{"42": -100}]
    )
    seed: int | None = Field(
        None, ge=-SEED_LIMIT, lt=SEED_LIMIT, description="Makes sampling reproducible.", examples=[7]
    )
    max_tokens: int | None = Field(
        None,
        description="Maximum number of tokens to generate; by default 16 after a text, and in a conversation as many "
        "as fit the context. More than `--max-tokens-limit` is a 400, and by default there are never more.",
    )
    min_tokens: int = Field(
        0,
        description="Minimum number of tokens before an end-of-sequence token, a stop token or a stop string may end "
        "the text. A constraint that allows nothing more ends it earlier.",
    )
    stop: StopStrings = Field(
        default_factory=list,
        description="Strings that end the text, which does not contain them. They may be special tokens.",
        examples=["\n\n"],
    )
    stop_token_ids: Annotated[list[int], FAIL_FAST] = Field(
        default_factory=list, max_length=MAX_TOKENS_NAMED, description="Tokens that end the text."
    )
    ignore_eos: bool = Field(
        False, description="Continue after an end-of-sequence token. Not allowed with a constraint."
    )
    stream: bool = Field(False, description="Answer with server-sent events.")
    projections: bool = Field(
        False,
        description="Report the residual stream's projection onto each profile's directions at each token, in units of "
        "strength: strength 1 adds 1 at one of the profile's blocks.",
    )

    @property
    def max_tokens_field(self) -> str | None:
        """The field that gives the number of tokens; None if it is left out."""
        return None if self.max_tokens is None else "max_tokens"

    def sampling(self, default_max_tokens: int | None = None) -> SamplingParameters:
        """Raises RequestError that names a field that is out of range."""
        given = {one.name: getattr(self, one.name) for one in fields(SamplingParameters)}
        given |= {"top_k": max(self.top_k, 0), "stop": tuple(self.stop), "stop_token_ids": tuple(self.stop_token_ids)}
        given["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        given["max_tokens"] = default_max_tokens if self.max_tokens is None else self.max_tokens
        return SamplingParameters(**given)


def refuse_no_tokens(parameters: SamplingParameters) -> SamplingParameters:
    """Raises RequestError for `max_tokens` 0, which makes sense only where the prompt is part of the answer."""
    if parameters.max_tokens == 0:
        raise RequestError("max_tokens must be at least 1; 0 is for completions with echo", param="max_tokens")
    return parameters
