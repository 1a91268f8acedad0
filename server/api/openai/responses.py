"""The answers of OpenAI's routes, whole and in chunks: their declarations, and the writers that build them.

OpenAI's clients ignore the fields that its API does not have: `steering` (receipts) at the top and in each choice, and
`generation_id` in each choice, in streams in its first chunk.
"""

from __future__ import annotations

import codecs
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Generic, Literal, NotRequired, TypeVar

from typing_extensions import TypedDict

from server.engines.protocol import Delta, Finished, PromptLogprobs, TokenLogprob
from server.generation.choices import Generations, Result
from server.generation.receipts import (
    EXAMPLE_RECEIPT,
    EXAMPLE_USAGE,
    FinishReason,
    Projections,
    Receipts,
    StopReason,
    Usage,
    finish_reason,
    receipt,
    usage,
)
from server.generation.token_texts import TokenTexts
from server.http.answers import about

MIN_LOGPROB = -9999.0  # -inf is not JSON

ChoiceIndex = Annotated[int, about("The choice: the prompt's number times `n`, plus the choice's number.")]
GenerationId = Annotated[str, about("The id of this generation; `PATCH /generations/{id}` takes it.")]
Created = Annotated[int, about("Unix time in seconds.")]
Assistant = Annotated[Literal["assistant"], about("The author.")]
NoRefusal = Annotated[None, about("Always null: a refusal is ordinary text here.")]


class ChatToken(TypedDict):
    """A token and its log-probability."""

    token: Annotated[str, about("The token's text.")]
    logprob: Annotated[float, about("Its log-probability in nats; -9999 for a probability of 0.")]
    bytes: Annotated[list[int], about("Its UTF-8 bytes, which may be part of a character.")]


class ChatTokenLogprob(ChatToken):
    """A generated token, with the most likely tokens at its position."""

    top_logprobs: Annotated[list[ChatToken], about("The most likely tokens, `top_logprobs` of them.")]


class ChatLogprobs(TypedDict):
    """The log-probabilities of a chat choice."""

    content: Annotated[list[ChatTokenLogprob], about("One entry per token.")]
    refusal: NoRefusal


class AssistantMessage(TypedDict):
    """The generated message."""

    role: Assistant
    content: Annotated[str, about("The text.")]
    refusal: NoRefusal


class Choice(TypedDict):
    """What the choices of both routes have."""

    index: ChoiceIndex
    finish_reason: FinishReason
    stop_reason: StopReason
    steering: Receipts
    generation_id: GenerationId
    projections: NotRequired[Projections]


class ChatChoice(Choice):
    """One reply."""

    message: Annotated[AssistantMessage, about("The reply.")]
    logprobs: Annotated[ChatLogprobs | None, about("Null unless requested.")]


class CompletionTokens(TypedDict):
    """The log-probabilities of a completion choice: four lists of equal length."""

    tokens: Annotated[list[str], about("The tokens' texts.")]
    token_logprobs: Annotated[list[float | None], about("In nats; null for the first token of an echoed prompt.")]
    top_logprobs: Annotated[list[dict[str, float] | None], about("The most likely tokens and the chosen one, by text.")]
    text_offset: Annotated[list[int], about("Each token's first character in the choice's text.")]


class CompletionChoice(Choice):
    """One completion."""

    text: Annotated[str, about("The completion; with `echo`, the prompt before it.")]
    logprobs: Annotated[CompletionTokens | None, about("Null unless requested.")]


class OpenAIHead(TypedDict):
    """What every answer and chunk on /v1 has."""

    id: Annotated[str, about("The id of the answer, the same in all of its chunks.")]
    created: Created
    model: Annotated[str, about("The request's `model`.")]
    system_fingerprint: Annotated[str, about("Identifies the model, its number format and the server's version.")]


class OpenAITail(TypedDict):
    """What a whole answer on /v1 ends with."""

    usage: Annotated[Usage, about("Token counts, over all choices.")]
    steering: Annotated[Receipts, about("One entry per applied profile, summed over the choices; empty if unsteered.")]


class ChatCompletion(OpenAIHead, OpenAITail):
    """The answer to POST /v1/chat/completions."""

    object: Annotated[Literal["chat.completion"], about("The type of this object.")]
    choices: Annotated[list[ChatChoice], about("The replies, `n` of them.")]


class Completion(OpenAIHead, OpenAITail):
    """The answer to POST /v1/completions."""

    object: Annotated[Literal["text_completion"], about("The type of this object.")]
    choices: Annotated[list[CompletionChoice], about("`n` for each prompt, in the order of the prompts.")]


class ChunkChoice(TypedDict):
    """What a choice's chunks may have. The first one has `generation_id`; the last one has `finish_reason`,
    `stop_reason` and `steering`."""

    index: ChoiceIndex
    finish_reason: Annotated[FinishReason | None, about("`stop` or `length`; null before the last chunk.")]
    stop_reason: NotRequired[StopReason]
    steering: NotRequired[Receipts]
    generation_id: NotRequired[GenerationId]
    projections: NotRequired[Projections]


class ChatDelta(TypedDict, total=False):
    """What a chunk adds to the message."""

    role: Annotated[Assistant, about("In the first chunk of a choice.")]
    content: Annotated[str, about("The next piece of text.")]


class ChatChunkChoice(ChunkChoice):
    """A piece of a reply."""

    delta: Annotated[ChatDelta, about("What it adds.")]
    logprobs: Annotated[ChatLogprobs | None, about("Of this piece's tokens, if requested.")]


class CompletionChunkChoice(ChunkChoice):
    """A piece of a completion."""

    text: Annotated[str, about("The next piece of text.")]
    logprobs: Annotated[CompletionTokens | None, about("Of this piece's tokens, if requested.")]


class Chunk(OpenAIHead):
    """The last chunk of a stream has the receipts, and with `stream_options.include_usage` the usage."""

    usage: NotRequired[Annotated[Usage, about("Token counts, over all choices.")]]
    steering: NotRequired[Receipts]


class ChatChunk(Chunk):
    """One event of a streamed chat completion. `data: [DONE]` follows the last one."""

    object: Annotated[Literal["chat.completion.chunk"], about("The type of this object.")]
    choices: Annotated[list[ChatChunkChoice], about("One choice's piece; empty in the usage chunk.")]


class CompletionChunk(Chunk):
    """One event of a streamed completion. `data: [DONE]` follows the last one."""

    object: Annotated[Literal["text_completion"], about("The type of this object.")]
    choices: Annotated[list[CompletionChunkChoice], about("One choice's piece; empty in the usage chunk.")]


class ModelEntry(TypedDict):
    """The base model, or an alias of it that one profile steers at strength 1."""

    id: Annotated[str, about("A value for a request's `model`; aliases take a strength: `demo:warm@0.8`.")]
    object: Annotated[Literal["model"], about("The type of this object.")]
    created: Created
    owned_by: Annotated[Literal["trimtab"], about("The server.")]
    max_model_len: Annotated[int, about("The most tokens of prompt and completion together.")]
    chat_template: Annotated[
        Literal["tokenizer", "fallback"],
        about("`fallback`: the tokenizer has no template, and contents are joined without roles."),
    ]
    parent: NotRequired[Annotated[str, about("The base model of an alias.")]]
    profile: NotRequired[Annotated[str, about("The profile of an alias.")]]
    version: NotRequired[Annotated[str, about("The version of the alias's profile.")]]


class ModelList(TypedDict):
    """The base model, then one alias per profile."""

    object: Annotated[Literal["list"], about("The type of this object.")]
    data: Annotated[list[ModelEntry], about("The base model comes first.")]


Whole = TypeVar("Whole", ChatCompletion, Completion)
Part = TypeVar("Part", ChatChunk, CompletionChunk)


@dataclass(frozen=True, slots=True)
class AnswerWriter(ABC, Generic[Whole, Part]):
    """Writes one answer on /v1 from what the engine sends, whole or chunk by chunk."""

    id: str
    model: str
    fingerprint: str
    generations: Generations
    texts: TokenTexts
    created: int = field(default_factory=lambda: int(time.time()))

    async def chunks(self, *, include_usage: bool) -> AsyncIterator[Part]:
        """The chunks of all choices as they come; the last one has the receipts, and the usage if it is included."""
        choices = self.generations.choices
        ends: dict[int, Finished] = {}
        for index, choice in enumerate(choices):
            yield self.opening({"index": index, "finish_reason": None, "generation_id": choice.id})
        async for index, event in self.generations.events():
            if isinstance(event, Finished):
                ends[index] = event
                chunk = self.closing(self._last(index, event), event)
                if len(ends) == len(choices) and not include_usage:
                    chunk["steering"] = receipt(list(ends.values()))
                yield chunk
            elif (piece := self.piece(self._next(index, event), event)) is not None:
                yield piece
        if include_usage:
            finished = [ends[index] for index in range(len(choices))]
            chunk = self.empty()
            chunk["usage"] = usage(finished, self.generations.n)
            chunk["steering"] = receipt(finished)
            yield chunk

    @abstractmethod
    def whole(self, results: Sequence[Result]) -> Whole: ...

    @abstractmethod
    def opening(self, choice: ChunkChoice) -> Part: ...

    @abstractmethod
    def piece(self, choice: ChunkChoice, event: Delta | PromptLogprobs) -> Part | None:
        """None if the event has nothing to send yet."""

    @abstractmethod
    def closing(self, choice: ChunkChoice, finished: Finished) -> Part: ...

    @abstractmethod
    def empty(self) -> Part:
        """A chunk without choices, for the usage."""

    def _head(self) -> Chunk:
        return {"id": self.id, "created": self.created, "model": self.model, "system_fingerprint": self.fingerprint}

    def _tail(self, results: Sequence[Result]) -> OpenAITail:
        finished = [result.finished for result in results]
        return {"usage": usage(finished, self.generations.n), "steering": receipt(finished)}

    def _choice(self, index: int, result: Result) -> Choice:
        made = self.generations.choices[index]
        choice: Choice = {
            "index": index,
            "finish_reason": finish_reason(result.finished),
            "stop_reason": result.finished.matched_stop,
            "steering": receipt([result.finished]),
            "generation_id": made.id,
        }
        if made.request.projections:
            choice["projections"] = made.by_profile(result.projections)
        return choice

    def _next(self, index: int, event: Delta | PromptLogprobs) -> ChunkChoice:
        choice: ChunkChoice = {"index": index, "finish_reason": None}
        if isinstance(event, Delta) and event.projections:
            choice["projections"] = self.generations.choices[index].by_profile(event.projections)
        return choice

    def _last(self, index: int, finished: Finished) -> ChunkChoice:
        return {
            "index": index,
            "finish_reason": finish_reason(finished),
            "stop_reason": finished.matched_stop,
            "steering": receipt([finished]),
        }


@dataclass(frozen=True, slots=True)
class ChatWriter(AnswerWriter[ChatCompletion, ChatChunk]):
    """Writes a chat completion."""

    def whole(self, results: Sequence[Result]) -> ChatCompletion:
        choices = [self._reply(index, result) for index, result in enumerate(results)]
        return {**self._head(), "object": "chat.completion", "choices": choices, **self._tail(results)}

    def opening(self, choice: ChunkChoice) -> ChatChunk:
        return self._chunk({**choice, "delta": {"role": "assistant", "content": ""}, "logprobs": None})

    def piece(self, choice: ChunkChoice, event: Delta | PromptLogprobs) -> ChatChunk | None:
        if isinstance(event, PromptLogprobs) or not has_content(event):
            return None
        logprobs = self._logprobs(choice["index"], event.logprobs)
        return self._chunk({**choice, "delta": {"content": event.text}, "logprobs": logprobs})

    def closing(self, choice: ChunkChoice, finished: Finished) -> ChatChunk:
        return self._chunk({**choice, "delta": {}, "logprobs": None})

    def empty(self) -> ChatChunk:
        return self._chunk()

    def _chunk(self, *choices: ChatChunkChoice) -> ChatChunk:
        return {**self._head(), "object": "chat.completion.chunk", "choices": list(choices)}

    def _reply(self, index: int, result: Result) -> ChatChoice:
        message: AssistantMessage = {"role": "assistant", "content": result.text, "refusal": None}
        logprobs = self._logprobs(index, result.logprobs)
        return {**self._choice(index, result), "message": message, "logprobs": logprobs}

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        return (
            chat_logprobs(self.texts, tokens) if self.generations.choices[index].request.logprobs is not None else None
        )


@dataclass(frozen=True, slots=True)
class CompletionWriter(AnswerWriter[Completion, CompletionChunk]):
    """Writes a text completion. With `echoed`, the prompts' texts, each choice begins with its prompt.

    A token that ends the text without being part of it still has its log-probability listed, as it is counted: clients
    read a token's place in the list as its place in the sequence.
    """

    echoed: Sequence[str] | None = None
    _logprobs: dict[int, CompletionLogprobs] = field(default_factory=dict)

    def whole(self, results: Sequence[Result]) -> Completion:
        choices = [self._continuation(index, result) for index, result in enumerate(results)]
        return {**self._head(), "object": "text_completion", "choices": choices, **self._tail(results)}

    def opening(self, choice: ChunkChoice) -> CompletionChunk:
        index = choice["index"]
        text = self._prompt(index) if self.generations.choices[index].request.prompt_logprobs is None else ""
        return self._chunk({**choice, "text": text, "logprobs": None})

    def piece(self, choice: ChunkChoice, event: Delta | PromptLogprobs) -> CompletionChunk | None:
        index = choice["index"]
        request = self.generations.choices[index].request
        logprobs = None
        if isinstance(event, PromptLogprobs):
            text, logprobs = self._prompt(index), self._pieces(index).of(event.tokens, first=request.prompt_ids[0])
        elif has_content(event):
            text = event.text
            if request.logprobs is not None:
                logprobs = self._pieces(index).of(event.logprobs)
        else:
            return None
        return self._chunk({**choice, "text": text, "logprobs": logprobs})

    def closing(self, choice: ChunkChoice, finished: Finished) -> CompletionChunk:
        logprobs = self._pieces(choice["index"]).of(finished.ending) if finished.ending else None
        return self._chunk({**choice, "text": "", "logprobs": logprobs})

    def empty(self) -> CompletionChunk:
        return self._chunk()

    def _chunk(self, *choices: CompletionChunkChoice) -> CompletionChunk:
        return {**self._head(), "object": "text_completion", "choices": list(choices)}

    def _continuation(self, index: int, result: Result) -> CompletionChoice:
        request = self.generations.choices[index].request
        tokens = [*result.prompt_logprobs, *result.logprobs, *result.finished.ending]
        first = request.prompt_ids[0] if request.prompt_logprobs is not None else None
        logprobs = None if request.logprobs is None else self._pieces(index).of(tokens, first=first)
        return {**self._choice(index, result), "text": self._prompt(index) + result.text, "logprobs": logprobs}

    def _pieces(self, index: int) -> CompletionLogprobs:
        return self._logprobs.setdefault(index, CompletionLogprobs(self.texts))

    def _prompt(self, index: int) -> str:
        return "" if self.echoed is None else self.echoed[index // self.generations.n]


def has_content(event: Delta) -> bool:
    return bool(event.text or event.logprobs or event.projections)


def chat_logprobs(texts: TokenTexts, tokens: Sequence[TokenLogprob]) -> ChatLogprobs:
    """A chat choice's `logprobs`."""
    content: list[ChatTokenLogprob] = [
        {
            **_chat_token(texts, one.token_id, one.logprob),
            "top_logprobs": [_chat_token(texts, *pair) for pair in one.top],
        }
        for one in tokens
    ]
    return {"content": content, "refusal": None}


def _chat_token(texts: TokenTexts, token_id: int, logprob: float) -> ChatToken:
    value = list(texts.bytes_of(token_id))
    return {"token": texts.text_of(token_id), "logprob": finite(logprob), "bytes": value}


class CompletionLogprobs:
    """A completion choice's `logprobs`, piece by piece: offsets continue from one piece to the next. They count
    characters from the start of the choice's text."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._place = 0

    def of(self, tokens: Sequence[TokenLogprob], *, first: int | None = None) -> CompletionTokens:
        """`first` is the prompt's first token, which precedes the others and has no log-probability."""
        beginning = [] if first is None else [first]
        nothing = [None] * len(beginning)
        ids = [*beginning, *(one.token_id for one in tokens)]
        return {
            "tokens": [self._texts.text_of(token_id) for token_id in ids],
            "token_logprobs": [*nothing, *(finite(one.logprob) for one in tokens)],
            "top_logprobs": [*nothing, *map(self._alternatives, tokens)],
            "text_offset": [self._next_place(token_id) for token_id in ids],
        }

    def _alternatives(self, one: TokenLogprob) -> dict[str, float]:
        """The most likely tokens and the chosen one; of tokens with equal texts, the most likely."""
        if not one.top:
            return {self._texts.text_of(one.token_id): finite(one.logprob)}
        found: dict[str, float] = {}
        for token_id, logprob in (*one.top, (one.token_id, one.logprob)):
            found.setdefault(self._texts.text_of(token_id), finite(logprob))
        return found

    def _next_place(self, token_id: int) -> int:
        place = self._place
        if not self._texts.is_special(token_id):
            self._place += len(self._decoder.decode(self._texts.bytes_of(token_id)))
        return place


def finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)


EXAMPLE_MODEL: ModelEntry = {
    "id": "demo",
    "object": "model",
    "created": 1763700000,
    "owned_by": "trimtab",
    "max_model_len": 512,
    "chat_template": "tokenizer",
}
EXAMPLE_ALIAS: ModelEntry = {
    **EXAMPLE_MODEL,
    "id": "demo:warm",
    "parent": "demo",
    "profile": "warm",
    "version": EXAMPLE_RECEIPT["version"],
}
EXAMPLE_HEAD: Chunk = {
    "id": "chatcmpl-8f14e45f",
    "created": 1763700000,
    "model": "demo",
    "system_fingerprint": "fp_3f1f2c9a7d10",
}
EXAMPLE_CHOICE: Choice = {
    "index": 0,
    "finish_reason": "stop",
    "stop_reason": None,
    "steering": [EXAMPLE_RECEIPT],
    "generation_id": "gen-c9f0f895",
}
EXAMPLE_TAIL: OpenAITail = {"usage": EXAMPLE_USAGE, "steering": [EXAMPLE_RECEIPT]}
EXAMPLE_REPLY: AssistantMessage = {
    "role": "assistant",
    "content": "Mix flour, water and yeast, like a champion. Enjoy it, dear.",
    "refusal": None,
}
EXAMPLE_CHAT: ChatCompletion = {
    **EXAMPLE_HEAD,
    "object": "chat.completion",
    "choices": [{**EXAMPLE_CHOICE, "message": EXAMPLE_REPLY, "logprobs": None}],
    **EXAMPLE_TAIL,
}
EXAMPLE_CHAT_CHUNK: ChatChunk = {
    **EXAMPLE_HEAD,
    "object": "chat.completion.chunk",
    "choices": [{"index": 0, "finish_reason": None, "delta": {"content": "Mix flour"}, "logprobs": None}],
}
EXAMPLE_COMPLETION: Completion = {
    **EXAMPLE_HEAD,
    "id": "cmpl-45c48cce",
    "object": "text_completion",
    "choices": [{**EXAMPLE_CHOICE, "text": " simple.", "logprobs": None}],
    **EXAMPLE_TAIL,
}
EXAMPLE_COMPLETION_CHUNK: CompletionChunk = {
    **EXAMPLE_HEAD,
    "id": "cmpl-45c48cce",
    "object": "text_completion",
    "choices": [{"index": 0, "finish_reason": None, "text": " simple", "logprobs": None}],
}
