"""The bodies of OpenAI's two generating routes, with this server's `steering` and vLLM's extensions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from server.api.fields.body import Body, Examples, NoOps
from server.api.fields.constraints import ConstrainedBody
from server.api.fields.prompts import EncodingBody, ManyPrompts, MessageBody, ProjectionsBody
from server.api.fields.steering import Steering
from server.api.fields.unsupported import NO_OPS, STREAM_NO_OPS
from server.engines.protocol import SamplingParameters
from server.generation.steering_grammar import EXAMPLE, HEADER, WantedSteering, parse_steering, refuse_two, split_model
from steering_vectors.errors import RequestError, SteeringError
from steering_vectors.profiles.profile import ApplyTo

MOST_CHOICES = 128
MOST_LOGPROBS = 20
COMPLETION_TOKENS = 16


def _not_false(value: Any) -> Any:
    """`false` asks for nothing, as null does; `true` is a chat's way of asking."""
    return None if value is False else value


Logprobs = Annotated[Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None, BeforeValidator(_not_false)]


class StreamOptions(Body):
    """What a stream holds besides the text."""

    no_ops: ClassVar[NoOps] = STREAM_NO_OPS

    include_usage: bool = Field(False, description="End with a chunk that has no choice and the usage.")


class OpenAIBody(ConstrainedBody, EncodingBody, ProjectionsBody):
    """What both routes take."""

    no_ops: ClassVar[NoOps] = NO_OPS

    model: str = Field(
        description="The served model, or an alias of it that is steered.", examples=["demo", "demo:warm@0.8"]
    )
    steering: Steering | None = Field(
        None, description="What to steer by; an alias in the model says it in short.", examples=[EXAMPLE]
    )
    n: int = Field(1, ge=1, le=MOST_CHOICES, description="How many choices to write for each prompt.")
    stream: bool = Field(False, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="For streams only.")
    user: str | None = Field(None, description="Accepted for OpenAI's sake, and not used.")
    metadata: dict[str, str] | None = Field(None, description="Accepted for OpenAI's sake, and not used.")

    @property
    def most_likely(self) -> int | None:
        """How many of the likeliest tokens are told at each place; None if no log-probabilities are wanted."""
        raise NotImplementedError

    @property
    def echoes(self) -> bool:
        """Whether the prompt is part of the answer."""
        return False

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def wanted_steering(self, base: str, header: str | None) -> WantedSteering:
        """What the model's alias, the steering field or the header asks for, `base` being the served model. An echoed
        prompt is steered as a whole. Raises UnknownModel, or SteeringError where more than one of them steers."""
        alias = split_model(self.model, base)
        where: ApplyTo = "all" if self.echoes else "generated"
        field = None if self.steering is None else "the field steering"
        told = None if alias is None else f"the model's alias {self.model!r}"
        refuse_two(told, field, None if header is None else f"the header {HEADER}")
        if (text := alias if header is None else header) is not None:
            return WantedSteering(parse_steering(text), where)
        wanted = WantedSteering() if self.steering is None else self.steering.wanted(where)
        if self.echoes and wanted.terms and wanted.apply_to == "generated":
            raise SteeringError(
                "with echo the prompt's tokens are scored, so they are steered: leave apply_to out or set it to all",
                param="steering.apply_to",
            )
        return wanted

    def check_stream_options(self) -> None:
        """Raises RequestError for options of a stream where none is asked for."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is for streams only: set stream to true", param="stream_options")


class ChatBody(OpenAIBody):
    """POST /v1/chat/completions. Without a limit a reply may be as long as the context."""

    no_ops: ClassVar[NoOps] = {**NO_OPS, "echo": (False,)}
    examples: ClassVar[Examples] = (
        {
            "model": "demo",
            "messages": [{"role": "user", "content": "How do I bake bread?"}],
            "steering": "warm@0.8+concise@-0.3",
            "max_tokens": 60,
            "seed": 7,
        },
    )

    messages: list[MessageBody] = Field(description="The conversation; the model writes the next turn.")
    max_completion_tokens: int | None = Field(None, ge=1, description="OpenAI's newer name of max_tokens.")
    logprobs: bool = Field(False, description="Tell the log-probability of each token.")
    top_logprobs: int = Field(
        0, ge=0, le=MOST_LOGPROBS, description="With logprobs: so many of the likeliest tokens at each place."
    )

    @property
    def most_likely(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    def sampling(self, default_max_tokens: int | None = None) -> SamplingParameters:
        newer, older = self.max_completion_tokens, self.max_tokens
        if newer is not None and older is not None and newer != older:
            raise RequestError(
                "max_tokens and max_completion_tokens differ: set only one of them", param="max_completion_tokens"
            )
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: set logprobs to true", param="top_logprobs")
        return refuse_no_tokens(super().sampling(newer))


class CompletionBody(OpenAIBody):
    """POST /v1/completions."""

    no_ops: ClassVar[NoOps] = {**NO_OPS, "top_logprobs": (0,)}
    examples: ClassVar[Examples] = ({"model": "demo:warm@0.8", "prompt": "Bread is", "max_tokens": 16, "seed": 7},)

    prompt: ManyPrompts = Field(description="One prompt or several, each a text or token ids.")
    echo: bool = Field(
        False, description="Begin with the prompt, and tell its log-probabilities too. It steers the whole prompt."
    )
    logprobs: Logprobs | None = Field(
        None, description="Tell the log-probability of each token, and so many of the likeliest at each place."
    )

    @property
    def most_likely(self) -> int | None:
        return self.logprobs

    @property
    def echoes(self) -> bool:
        return self.echo

    def sampling(self, default_max_tokens: int | None = COMPLETION_TOKENS) -> SamplingParameters:
        found = super().sampling(default_max_tokens)
        return found if self.echo else refuse_no_tokens(found)


def refuse_no_tokens(parameters: SamplingParameters) -> SamplingParameters:
    """Raises RequestError for `max_tokens` 0, which makes sense only where the prompt is part of the answer."""
    if parameters.max_tokens == 0:
        raise RequestError("max_tokens must be at least 1; 0 is for completions with echo", param="max_tokens")
    return parameters
