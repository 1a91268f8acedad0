"""The fields of a request that say how tokens are drawn and when to stop; the same for every route.

Types and shapes are checked here, ranges by `SamplingParameters`, token ids against the vocabulary by the engine.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from server.api.fields.body import Body, OrElse
from server.engines.protocol import SamplingParameters

MOST_STOPS = 16
SEED_LIMIT = 2**63


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


StopStrings = Annotated[
    list[str], Field(max_length=MOST_STOPS), BeforeValidator(_listed), OrElse({"type": "string", "minLength": 1})
]
TokenId = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


class SamplingBody(Body):
    """OpenAI's sampling fields, and vLLM's where OpenAI has none. Defaults are OpenAI's."""

    temperature: float = Field(1.0, description="0 is greedy.")
    top_p: float = Field(1.0, description="Keep the most probable tokens that reach this mass.")
    top_k: int = Field(0, ge=-1, description="Keep this many tokens; 0 or -1 keeps all.")
    min_p: float = Field(0.0, description="Drop tokens below this part of the most probable one.")
    repetition_penalty: float = Field(1.0, description="Divides the logits of tokens seen in prompt and completion.")
    presence_penalty: float = Field(0.0, description="Taken from the logits of tokens in the completion.")
    frequency_penalty: float = Field(0.0, description="The same, once for each occurrence.")
    logit_bias: dict[TokenId, Bias] = Field(
        default_factory=dict, description="Token id to -100..100.", examples=[{"42": -100}]
    )
    seed: int | None = Field(
        None, ge=-SEED_LIMIT, lt=SEED_LIMIT, description="Makes a request repeatable.", examples=[7]
    )
    max_tokens: int | None = Field(None, description="The most tokens to write.")
    min_tokens: int = Field(0, description="No end before so many tokens, unless a constraint leaves no choice.")
    stop: StopStrings = Field(
        default_factory=list, description="Texts that end the completion; they are cut off.", examples=["\n\n"]
    )
    stop_token_ids: list[int] = Field(default_factory=list, max_length=1024, description="Tokens that end it.")
    ignore_eos: bool = Field(
        False, description="Write on after an end-of-sequence token. Not with a constraint, whose texts end with one."
    )

    def sampling(self, default_max_tokens: int | None = None) -> SamplingParameters:
        """Raises RequestError that names a field out of its range."""
        return SamplingParameters(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias={int(token): bias for token, bias in self.logit_bias.items()},
            seed=self.seed,
            max_tokens=default_max_tokens if self.max_tokens is None else self.max_tokens,
            min_tokens=self.min_tokens,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
        )
