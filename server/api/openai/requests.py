"""The bodies of OpenAI's two generating routes, with this server's `steering` and vLLM's extensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field

from server.api.fields.body import ABOUT_USER, OPENAI_NO_OPS, Body, Examples, NoOps, Short, at_most
from server.api.fields.constraints import ConstrainedBody
from server.api.fields.prompts import EncodingBody, ManyPrompts, Messages, messages_of
from server.api.fields.sampling import COMPLETION_TOKENS, refuse_no_tokens
from server.api.fields.steering import Steering
from server.engines.protocol import ApplyTo, GenerationRequest, SamplingParameters, SteeringPlan
from server.generation.intake import Ask, Prompt
from server.generation.steering_grammar import EXAMPLE, of_alias, only_one
from steering_vectors.errors import RequestError, SteeringError

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_METADATA = 16  # entries
MAX_MODEL = 8192  # characters of a name with a steering


Logprobs = Annotated[
    Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None,
    BeforeValidator(lambda value: None if value is False else value),  # false is a chat's way to request nothing
]


class StreamOptions(Body):
    """Options of a stream."""

    no_ops: ClassVar[NoOps] = {"include_obfuscation": (False,)}

    include_usage: bool = Field(False, description="End with a chunk that has the usage and no choice.")


class OpenAIBody(ConstrainedBody, EncodingBody):
    """The fields of both routes."""

    model: str = Field(
        max_length=MAX_MODEL,
        description="The served model, or an alias of it with a steering.",
        examples=["demo", "demo:warm@0.8"],
    )
    steering: Steering | None = Field(
        None, description="The steering; an alias in `model` is a short form of it.", examples=[EXAMPLE]
    )
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="Number of choices for each prompt.")
    stream_options: StreamOptions | None = Field(None, description="Options of a stream; only with `stream`.")
    user: Short | None = Field(None, description=ABOUT_USER)
    metadata: Annotated[dict[Short, Short], BeforeValidator(at_most(MAX_METADATA))] | None = Field(
        None, description="Accepted for compatibility. It has no effect."
    )

    def asked(
        self, prompts: Sequence[Prompt], served: str, header: str | None, *, logprobs: int | None, echo: bool = False
    ) -> Ask:
        """`logprobs` is the number of most likely tokens listed at each position; None without log-probabilities.
        `echo`: the prompt is part of the answer."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is for streams only: set stream to true", param="stream_options")
        prompt_logprobs = logprobs if echo else None
        return Ask(
            prompts,
            encoding=self.encoding(),
            plans={"steering": self._plan(served, header, echo)},
            common=GenerationRequest((), (), self.sampling(), logprobs=logprobs, prompt_logprobs=prompt_logprobs),
            n=self.n,
            constraints=self.constraints(),
            projections=self.projections,
            counted="n" if self.n > 1 else "prompt",
            user=self.user,
        )

    def _plan(self, served: str, header: str | None, echo: bool) -> SteeringPlan:
        """The steering of the alias, the field or the header. An echoed prompt is steered as a whole."""
        where: ApplyTo = "all" if echo else "generated"
        sources = {
            f"the model's alias {self.model!r}": of_alias(self.model, served, where),
            "the field steering": None if self.steering is None else self.steering.plan(where),
        }
        plan = only_one(sources, header, where)
        if echo and plan.terms and plan.apply_to == "generated":
            raise SteeringError(
                "with echo the prompt's tokens are scored, so they are steered: leave apply_to out or set it to all",
                param="apply_to",
            )
        return plan


class ChatBody(OpenAIBody):
    """The body of POST /v1/chat/completions. By default a reply may be as long as the context."""

    no_ops: ClassVar[NoOps] = {**OPENAI_NO_OPS, "echo": (False,), "prompt": ()}
    examples: ClassVar[Examples] = (
        {
            "model": "demo",
            "messages": [{"role": "user", "content": "How do I bake bread?"}],
            "steering": "warm@0.8+concise@-0.3",
            "max_tokens": 60,
            "seed": 7,
        },
    )

    messages: Messages = Field(description="The conversation, which the model continues with the next turn.")
    max_completion_tokens: int | None = Field(None, ge=1, description="A newer name of `max_tokens`.")
    logprobs: bool = Field(False, description="Report the log-probability of each token.")
    top_logprobs: int = Field(
        0, ge=0, le=MAX_LOGPROBS, description="With `logprobs`: number of most likely tokens to list at each position."
    )

    def ask(self, served: str, header: str | None) -> Ask:
        logprobs = self.top_logprobs if self.logprobs else None
        return self.asked((messages_of(self.messages),), served, header, logprobs=logprobs)

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
    """The body of POST /v1/completions."""

    no_ops: ClassVar[NoOps] = {**OPENAI_NO_OPS, "messages": (), "top_logprobs": (0,)}
    examples: ClassVar[Examples] = ({"model": "demo:warm@0.8", "prompt": "Bread is", "max_tokens": 16, "seed": 7},)

    prompt: ManyPrompts = Field(description="One or more prompts, each a text or token ids.")
    echo: bool = Field(
        False, description="Begin the text with the prompt, and report its log-probabilities. Steers the whole prompt."
    )
    logprobs: Logprobs | None = Field(
        None, description="Report the log-probability of each token, and list this many of the most likely ones."
    )

    def ask(self, served: str, header: str | None) -> Ask:
        return self.asked(self.prompt, served, header, logprobs=self.logprobs, echo=self.echo)

    def sampling(self, default_max_tokens: int | None = COMPLETION_TOKENS) -> SamplingParameters:
        found = super().sampling(default_max_tokens)
        return found if self.echo else refuse_no_tokens(found)
