"""The bodies of OpenAI's two generating routes, with this server's `steering` and vLLM's extensions."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from server.engine.protocol import SamplingParameters
from server.schemas.body import Body, NoOps
from server.schemas.prompts import EncodingBody, ManyPrompts, MessageBody
from server.schemas.sampling import SamplingBody
from server.schemas.steering import Steering
from server.schemas.unsupported import NO_OPS, STREAM_NO_OPS
from steering_vectors.errors import RequestError

MOST_CHOICES = 128
COMPLETION_TOKENS = 16


class StreamOptions(Body):
    """What a stream holds besides the text."""

    no_ops: ClassVar[NoOps] = STREAM_NO_OPS

    include_usage: bool = Field(False, description="End with a chunk that has no choice and the usage.")


class OpenAIBody(SamplingBody, EncodingBody):
    """What both routes take."""

    no_ops: ClassVar[NoOps] = NO_OPS

    model: str = Field(description="The served model, or an alias such as demo:warm@0.8.")
    steering: Steering | None = Field(None, description="What to steer by; an alias in the model says it in short.")
    n: int = Field(1, ge=1, le=MOST_CHOICES, description="How many choices to write for each prompt.")
    stream: bool = Field(False, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="For streams only.")
    user: str | None = Field(None, description="Accepted for OpenAI's sake, and not used.")
    metadata: dict[str, str] | None = Field(None, description="Accepted for OpenAI's sake, and not used.")

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def check_stream_options(self) -> None:
        """Raises RequestError for options of a stream where none is asked for."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is for streams only: set stream to true", param="stream_options")


class ChatBody(OpenAIBody):
    """POST /v1/chat/completions. Without a limit a reply may be as long as the context."""

    messages: list[MessageBody] = Field(description="The conversation; the model writes the next turn.")
    max_completion_tokens: int | None = Field(None, description="OpenAI's newer name of max_tokens.")

    def sampling(self, default_max_tokens: int | None = None) -> SamplingParameters:
        newer, older = self.max_completion_tokens, self.max_tokens
        if newer is not None and older is not None and newer != older:
            raise RequestError(
                "max_tokens and max_completion_tokens differ: set only one of them", param="max_completion_tokens"
            )
        return super().sampling(newer)


class CompletionBody(OpenAIBody):
    """POST /v1/completions."""

    prompt: ManyPrompts = Field(description="One prompt or several, each a text or token ids.")

    def sampling(self, default_max_tokens: int | None = COMPLETION_TOKENS) -> SamplingParameters:
        return super().sampling(default_max_tokens)
