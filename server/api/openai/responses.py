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
from typing import Annotated, Any, ClassVar, Literal, NotRequired, cast

from typing_extensions import TypedDict

from server.engines.protocol import Delta, Event, Finished, GenerationRequest, PromptLogprobs, TokenLogprob
from server.generation.choices import Generations, Result
from server.generation.receipts import (
    EXAMPLE_SHA256,
    Ending,
    FinishReason,
    Projections,
    Receipts,
    StopReason,
    Usage,
    ending,
    receipt,
    usage,
)
from server.generation.token_texts import TokenTexts
from server.http.answers import about

MIN_LOGPROB = -9999.0  # -inf is not JSON

ChoiceIndex = Annotated[int, about("The choice: the prompt's number times `n`, plus the choice's number.", 0)]
Created = Annotated[int, about("Unix time in seconds.", 1763700000)]
Assistant = Annotated[Literal["assistant"], about("The author.")]
NoRefusal = Annotated[None, about("Always null: a refusal is ordinary text here.")]
GENERATION_ID = "The id of this generation; `PATCH /generations/{id}` takes it."


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
    content: Annotated[str, about("The text.", "Mix flour, water and yeast, like a champion. Enjoy it, dear.")]
    refusal: NoRefusal


class Choice(Ending):
    """What the choices of both routes have."""

    index: ChoiceIndex
    steering: Receipts
    generation_id: Annotated[str, about(GENERATION_ID, "gen-c9f0f895")]
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

    text: Annotated[str, about("The completion; with `echo`, the prompt before it.", " simple.")]
    logprobs: Annotated[CompletionTokens | None, about("Null unless requested.")]


class OpenAIHead(TypedDict):
    """What every answer and chunk on /v1 has."""

    id: Annotated[
        str, about("`chatcmpl-` or `cmpl-` and a number, the same in all chunks of an answer.", "cmpl-8f14e45f")
    ]
    created: Created
    model: Annotated[str, about("The request's `model`.", "demo")]
    system_fingerprint: Annotated[
        str, about("Identifies the model, its number format and the server's version.", "fp_3f1f2c9a7d10")
    ]


class OpenAIAnswer(OpenAIHead):
    """What every whole answer on /v1 has."""

    usage: Annotated[Usage, about("Token counts, over all choices.")]
    steering: Annotated[Receipts, about("One entry per applied profile, summed over the choices; empty if unsteered.")]


class ChatCompletion(OpenAIAnswer):
    """The answer to POST /v1/chat/completions."""

    object: Annotated[Literal["chat.completion"], about("The type of this object.")]
    choices: Annotated[list[ChatChoice], about("The replies, `n` of them.")]


class Completion(OpenAIAnswer):
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
    generation_id: NotRequired[Annotated[str, about(GENERATION_ID)]]
    projections: NotRequired[Projections]


class ChatDelta(TypedDict, total=False):
    """What a chunk adds to the message."""

    role: Annotated[Assistant, about("In the first chunk of a choice.")]
    content: Annotated[str, about("The next piece of text.", "Mix flour")]


class ChatChunkChoice(ChunkChoice):
    """A piece of a reply."""

    delta: Annotated[ChatDelta, about("What it adds.")]
    logprobs: Annotated[ChatLogprobs | None, about("Of this piece's tokens, if requested.")]


class CompletionChunkChoice(ChunkChoice):
    """A piece of a completion."""

    text: Annotated[str, about("The next piece of text.", " simple")]
    logprobs: Annotated[CompletionTokens | None, about("Of this piece's tokens, if requested.")]


class OpenAIChunk(OpenAIHead):
    """The last chunk of a stream has the receipts, and with `stream_options.include_usage` the usage."""

    usage: NotRequired[Annotated[Usage, about("Token counts, over all choices.")]]
    steering: NotRequired[Receipts]


class ChatChunk(OpenAIChunk):
    """One event of a streamed chat completion. `data: [DONE]` follows the last one."""

    object: Annotated[Literal["chat.completion.chunk"], about("The type of this object.")]
    choices: Annotated[list[ChatChunkChoice], about("One choice's piece; empty in the usage chunk.")]


class CompletionChunk(OpenAIChunk):
    """One event of a streamed completion. `data: [DONE]` follows the last one."""

    object: Annotated[Literal["text_completion"], about("The type of this object.")]
    choices: Annotated[list[CompletionChunkChoice], about("One choice's piece; empty in the usage chunk.")]


class ModelEntry(TypedDict):
    """The base model, or an alias of it that one profile steers at strength 1."""

    id: Annotated[str, about("A value for a request's `model`; aliases take a strength: `demo:warm@0.8`.", "demo:warm")]
    object: Annotated[Literal["model"], about("The type of this object.")]
    created: Created
    owned_by: Annotated[Literal["trimtab"], about("The server.")]
    max_model_len: Annotated[int, about("The most tokens of prompt and completion together.", 512)]
    chat_template: Annotated[
        Literal["tokenizer", "fallback", "unusable"],
        about(
            "`tokenizer`: the tokenizer's own, or that of `--chat-template`. `fallback`: there is none, and contents "
            "are joined without roles. `unusable`: it cannot be used, and conversations are a 400 that says why."
        ),
    ]
    parent: NotRequired[Annotated[str, about("The base model of an alias.", "demo")]]
    profile: NotRequired[Annotated[str, about("The profile of an alias.", "warm")]]
    version: NotRequired[Annotated[str, about("The version of the alias's profile.", EXAMPLE_SHA256)]]


class ModelList(TypedDict):
    """The base model, then one alias per profile."""

    object: Annotated[Literal["list"], about("The type of this object.")]
    data: Annotated[list[ModelEntry], about("The base model comes first.")]


@dataclass(frozen=True, slots=True)
class AnswerWriter(ABC):
    """Writes one answer on /v1 from what the engine sends, whole or chunk by chunk."""

    kind: ClassVar[str]  # the `object` of a whole answer
    chunk_kind: ClassVar[str]

    id: str
    model: str
    fingerprint: str
    generations: Generations
    texts: TokenTexts
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, results: Sequence[Result]) -> dict[str, Any]:
        choices = []
        for index, result in enumerate(results):
            made, finished = self.generations.choices[index], result.finished
            end = {**ending(finished), "steering": receipt([finished]), "generation_id": made.id}
            if made.request.projections:
                end["projections"] = made.by_profile(result.projections)
            choices.append(self.choice(cast(Choice, {"index": index, **end}), result))
        return {**self._object(self.kind, choices), **self._totals([result.finished for result in results])}

    async def chunks(self, *, include_usage: bool) -> AsyncIterator[dict[str, Any]]:
        """The chunks of all choices as they come; the last one has the receipts, and the usage if it is included."""
        choices = self.generations.choices
        ends: dict[int, Finished] = {}
        for index, choice in enumerate(choices):
            yield self._chunk({"index": index, "finish_reason": None, "generation_id": choice.id}, None)
        async for index, event in self.generations.events():
            part: ChunkChoice = {"index": index, "finish_reason": None}
            if isinstance(event, Finished):
                ends[index] = event
                chunk = self._chunk({**part, **ending(event), "steering": receipt([event])}, event)
                if len(ends) == len(choices) and not include_usage:
                    chunk["steering"] = receipt(list(ends.values()))
                yield chunk
            elif isinstance(event, PromptLogprobs):
                yield self._chunk(part, event)
            elif event.text or event.logprobs or event.projections:
                if event.projections:
                    part["projections"] = choices[index].by_profile(event.projections)
                yield self._chunk(part, event)
        if include_usage:
            totals = self._totals([ends[index] for index in range(len(choices))])
            yield {**self._object(self.chunk_kind, []), **totals}

    @abstractmethod
    def choice(self, choice: Choice, result: Result) -> Choice:
        """Add the text and its log-probabilities to a choice of a whole answer."""

    @abstractmethod
    def part(self, choice: ChunkChoice, event: Event | None) -> ChunkChoice:
        """Add what an event has to a choice of a chunk. The first chunk of a choice has no event."""

    def _chunk(self, choice: ChunkChoice, event: Event | None) -> dict[str, Any]:
        return self._object(self.chunk_kind, [self.part(choice, event)])

    def _object(self, kind: str, choices: Sequence[Choice | ChunkChoice]) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "system_fingerprint": self.fingerprint, "choices": choices}

    def _totals(self, finished: Sequence[Finished]) -> dict[str, Any]:
        return {"usage": usage(finished, self.generations.n), "steering": receipt(finished)}

    def _request(self, choice: Choice | ChunkChoice) -> GenerationRequest:
        return self.generations.choices[choice["index"]].request


@dataclass(frozen=True, slots=True)
class ChatWriter(AnswerWriter):
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def choice(self, choice: Choice, result: Result) -> ChatChoice:
        message: AssistantMessage = {"role": "assistant", "content": result.text, "refusal": None}
        return {**choice, "message": message, "logprobs": self._logprobs(choice, result.logprobs)}

    def part(self, choice: ChunkChoice, event: Event | None) -> ChatChunkChoice:
        if isinstance(event, Delta):
            logprobs = self._logprobs(choice, event.logprobs)
            return {**choice, "delta": {"content": event.text}, "logprobs": logprobs}
        return {**choice, "delta": {"role": "assistant", "content": ""} if event is None else {}, "logprobs": None}

    def _logprobs(self, choice: Choice | ChunkChoice, tokens: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        return None if self._request(choice).logprobs is None else chat_logprobs(self.texts, tokens)


@dataclass(frozen=True, slots=True)
class CompletionWriter(AnswerWriter):
    """Writes a text completion. With `echoed`, the prompts' texts, each choice begins with its prompt.

    A token that ends the text without being part of it still has its log-probability listed, as it is counted: clients
    read a token's place in the list as its place in the sequence.
    """

    kind = chunk_kind = "text_completion"

    echoed: Sequence[str] | None = None
    _pieces: dict[int, CompletionLogprobs] = field(default_factory=dict)

    def choice(self, choice: Choice, result: Result) -> CompletionChoice:
        request = self._request(choice)
        tokens = [*result.prompt_logprobs, *result.logprobs, *result.finished.ending]
        first = request.prompt_ids[0] if request.prompt_logprobs is not None else None
        logprobs = None if request.logprobs is None else self._logprobs(choice, tokens, first)
        return {**choice, "text": self._prompt(choice) + result.text, "logprobs": logprobs}

    def part(self, choice: ChunkChoice, event: Event | None) -> CompletionChunkChoice:
        request = self._request(choice)
        text, logprobs = "", None
        if event is None:
            text = self._prompt(choice) if request.prompt_logprobs is None else ""
        elif isinstance(event, PromptLogprobs):
            text, logprobs = self._prompt(choice), self._logprobs(choice, event.tokens, request.prompt_ids[0])
        elif isinstance(event, Delta):
            text, logprobs = event.text, None if request.logprobs is None else self._logprobs(choice, event.logprobs)
        elif event.ending:
            logprobs = self._logprobs(choice, event.ending)
        return {**choice, "text": text, "logprobs": logprobs}

    def _logprobs(
        self, choice: Choice | ChunkChoice, tokens: Sequence[TokenLogprob], first: int | None = None
    ) -> CompletionTokens:
        pieces = self._pieces.setdefault(choice["index"], CompletionLogprobs(self.texts))
        return pieces.of(tokens, first=first)

    def _prompt(self, choice: Choice | ChunkChoice) -> str:
        return "" if self.echoed is None else self.echoed[choice["index"] // self.generations.n]


def chat_logprobs(texts: TokenTexts, tokens: Sequence[TokenLogprob]) -> ChatLogprobs:
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
        if token_id not in self._texts.special:
            self._place += len(self._decoder.decode(self._texts.bytes_of(token_id)))
        return place


def finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)
