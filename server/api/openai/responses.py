"""What OpenAI's routes answer, whole and in chunks, for the OpenAPI document. `answers` says what holds them to it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from server.api.fields.answers import (
    APPLIED,
    FINISH,
    PROJECTIONS,
    RECEIPT,
    STOP,
    USAGE,
    Answer,
    FinishReason,
    SteeringReceipt,
    Usage,
)

CREATED = "When, in seconds since 1970."
GENERATION = "The id of this generation, which addresses it while it runs."
INDEX = "Which choice: prompt number times n, plus the number of the choice."
HEAD: dict[str, Any] = {"created": 1763700000, "model": "demo", "system_fingerprint": "fp_3f1f2c9a7d10"}
ENDING: dict[str, Any] = {"finish_reason": "stop", "stop_reason": None, "steering": [RECEIPT]}
TAIL = {"usage": USAGE, "steering": [RECEIPT]}
REPLY = "Mix flour, water and yeast, like a champion. Enjoy it, dear."


class ChatToken(Answer):
    """One token and its log-probability."""

    token: str = Field(description="Its text.")
    logprob: float = Field(description="Its log-probability in nats; -9999 if it had none.")
    bytes: list[int] = Field(description="Its bytes, for tokens that are part of a character.")


class ChatTokenLogprob(ChatToken):
    """A written token, with the likeliest ones in its place."""

    top_logprobs: list[ChatToken] = Field(description="The likeliest tokens, as many as `top_logprobs` asked for.")


class ChatLogprobs(Answer):
    """A chat choice's log-probabilities."""

    content: list[ChatTokenLogprob] = Field(description="One entry per token.")
    refusal: None = Field(description="Always null: a refusal is text like any other here.")


class AssistantMessage(Answer):
    """What the model wrote."""

    role: Literal["assistant"] = Field(description="Who speaks.")
    content: str = Field(description="The text.")
    refusal: None = Field(description="Always null.")


class ChatChoice(Answer):
    """One reply."""

    index: int = Field(description=INDEX)
    message: AssistantMessage = Field(description="The reply.")
    logprobs: ChatLogprobs | None = Field(description="Null unless they were asked for.")
    finish_reason: FinishReason = Field(description=FINISH)
    stop_reason: str | int | None = Field(description=STOP)
    steering: list[SteeringReceipt] = Field(description=APPLIED)
    generation_id: str = Field(description=GENERATION)
    projections: dict[str, list[float]] = Field({}, description=PROJECTIONS)


class OpenAIHead(Answer):
    """What every answer and chunk on /v1 begins with."""

    id: str = Field(description="The id of the answer, the same in all of its chunks.")
    created: int = Field(description=CREATED)
    model: str = Field(description="The model as the request named it.")
    system_fingerprint: str = Field(
        description="Tells one model, its number format and version of the server from another."
    )


class ChatCompletion(OpenAIHead):
    """The reply to POST /v1/chat/completions."""

    examples = (
        {
            "id": "chatcmpl-8f14e45f",
            "object": "chat.completion",
            **HEAD,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": REPLY, "refusal": None},
                    "logprobs": None,
                    **ENDING,
                    "generation_id": "gen-c9f0f895",
                }
            ],
            **TAIL,
        },
    )

    object: Literal["chat.completion"] = Field(description="What this is.")
    choices: list[ChatChoice] = Field(description="The replies, as many as `n` asked for.")
    usage: Usage = Field(description="Tokens, over all choices.")
    steering: list[SteeringReceipt] = Field(description=f"{APPLIED} `steered_tokens` is summed over the choices.")


class ChatDelta(Answer):
    """What a chunk adds to the message."""

    role: Literal["assistant"] = Field("assistant", description="In the first chunk of a choice.")
    content: str = Field("", description="The next piece of text.")


class ChunkChoice(Answer):
    """What all chunks of a choice may say. The first has `generation_id`, the last `finish_reason` and its company."""

    index: int = Field(description=INDEX)
    finish_reason: FinishReason | None = Field(description=f"{FINISH} Null until then.")
    stop_reason: str | int | None = Field(None, description=f"In the last chunk of the choice. {STOP}")
    steering: list[SteeringReceipt] = Field([], description=f"In the last chunk of the choice. {APPLIED}")
    generation_id: str = Field("", description=f"In the first chunk of the choice. {GENERATION}")
    projections: dict[str, list[float]] = Field({}, description=PROJECTIONS)


class ChatChunkChoice(ChunkChoice):
    """A piece of a reply."""

    delta: ChatDelta = Field(description="What it adds.")
    logprobs: ChatLogprobs | None = Field(None, description="Of the tokens of this piece, if they were asked for.")


class Chunk(OpenAIHead):
    """What ends a stream: the very last chunk holds these."""

    usage: Usage | None = Field(None, description="With `stream_options.include_usage`, in the last chunk.")
    steering: list[SteeringReceipt] = Field([], description=f"In the last chunk of the stream. {APPLIED}")


class ChatChunk(Chunk):
    """One event of a streamed chat completion; after the last comes `data: [DONE]`."""

    examples = (
        {
            "id": "chatcmpl-8f14e45f",
            "object": "chat.completion.chunk",
            **HEAD,
            "choices": [{"index": 0, "delta": {"content": "Mix flour"}, "logprobs": None, "finish_reason": None}],
        },
    )

    object: Literal["chat.completion.chunk"] = Field(description="What this is.")
    choices: list[ChatChunkChoice] = Field(description="One choice's piece; empty in the chunk that has the usage.")


class CompletionTokens(Answer):
    """A completion choice's log-probabilities: four lists of one length."""

    tokens: list[str] = Field(description="The tokens' texts.")
    token_logprobs: list[float | None] = Field(description="In nats; null for the first token of an echoed prompt.")
    top_logprobs: list[dict[str, float] | None] = Field(description="The likeliest tokens and the chosen one, by text.")
    text_offset: list[int] = Field(description="Where each token begins in the choice's text, in characters.")


class CompletionChoice(Answer):
    """One continuation."""

    index: int = Field(description=INDEX)
    text: str = Field(description="The continuation; with `echo`, the prompt before it.")
    logprobs: CompletionTokens | None = Field(description="Null unless they were asked for.")
    finish_reason: FinishReason = Field(description=FINISH)
    stop_reason: str | int | None = Field(description=STOP)
    steering: list[SteeringReceipt] = Field(description=APPLIED)
    generation_id: str = Field(description=GENERATION)
    projections: dict[str, list[float]] = Field({}, description=PROJECTIONS)


class Completion(OpenAIHead):
    """The answer to POST /v1/completions."""

    examples = (
        {
            "id": "cmpl-45c48cce",
            "object": "text_completion",
            **HEAD,
            "choices": [{"index": 0, "text": " simple.", "logprobs": None, **ENDING, "generation_id": "gen-6512bd43"}],
            **TAIL,
        },
    )

    object: Literal["text_completion"] = Field(description="What this is.")
    choices: list[CompletionChoice] = Field(description="`n` for each prompt, in the order of the prompts.")
    usage: Usage = Field(description="Tokens, over all choices.")
    steering: list[SteeringReceipt] = Field(description=f"{APPLIED} `steered_tokens` is summed over the choices.")


class CompletionChunkChoice(ChunkChoice):
    """A piece of a continuation."""

    text: str = Field(description="The next piece of text.")
    logprobs: CompletionTokens | None = Field(None, description="Of the tokens of this piece, if they were asked for.")


class CompletionChunk(Chunk):
    """One event of a streamed completion; after the last comes `data: [DONE]`."""

    examples = (
        {
            "id": "cmpl-45c48cce",
            "object": "text_completion",
            **HEAD,
            "choices": [{"index": 0, "text": " simple", "logprobs": None, "finish_reason": None}],
        },
    )

    object: Literal["text_completion"] = Field(description="What this is.")
    choices: list[CompletionChunkChoice] = Field(
        description="One choice's piece; empty in the chunk that has the usage."
    )


BASE_ENTRY = {
    "id": "demo",
    "object": "model",
    "created": 1763700000,
    "owned_by": "trimtab",
    "max_model_len": 512,
    "chat_template": "tokenizer",
}
ALIAS_ENTRY = {
    **BASE_ENTRY,
    "id": "demo:warm",
    "parent": "demo",
    "profile": "warm",
    "version": RECEIPT["version"],
}


class ModelEntry(Answer):
    """The base model, or an alias of it that one profile steers at strength 1."""

    examples = (ALIAS_ENTRY,)

    id: str = Field(description="What `model` of a request may be; an alias also takes a strength, `demo:warm@0.8`.")
    object: Literal["model"] = Field(description="What this is.")
    created: int = Field(description=CREATED)
    owned_by: Literal["trimtab"] = Field(description="Who serves it.")
    max_model_len: int = Field(description="The most tokens of prompt and completion together.")
    chat_template: Literal["tokenizer", "fallback"] = Field(
        description="Where the template is from; `fallback` joins the contents of messages by newlines, without roles."
    )
    parent: str = Field("", description="Of an alias: the base model.")
    profile: str = Field("", description="Of an alias: its profile.")
    version: str = Field("", description="Of an alias: the version of its profile.")


class ModelList(Answer):
    """The base model, then one alias per profile."""

    examples = ({"object": "list", "data": [BASE_ENTRY, ALIAS_ENTRY]},)

    object: Literal["list"] = Field(description="What this is.")
    data: list[ModelEntry] = Field(description="The base model first.")
