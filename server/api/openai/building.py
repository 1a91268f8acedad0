"""What generating routes answer: receipts, usage, and OpenAI's objects, whole and in chunks.

Owns shapes only: dictionaries that are ready to be written as JSON. Knows nothing of how they are sent.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from server.api.openai.logprob_objects import CompletionLogprobs, chat_logprobs
from server.engines.protocol import Delta, Finished, GenerationRequest, PromptLogprobs, TokenLogprob
from server.generation.choices import Result
from server.generation.receipts import receipt, told_projections
from server.generation.token_texts import TokenTexts

Json = dict[str, Any]


def usage(finished: Sequence[Finished], n: int = 1) -> Json:
    """OpenAI's usage. A prompt counts once for all of its n choices, cached as far as it was for the first of them."""
    first = finished[::n]
    prompt = sum(one.prompt_tokens for one in first)
    completion = sum(one.completion_tokens for one in finished)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in first)},
    }


def ending(finished: Finished) -> Json:
    """How a text of the native routes ended."""
    return {
        "finish_reason": finished.reason,
        "stop_reason": finished.matched_stop,
        "usage": usage([finished]),
        "steering": receipt([finished]),
    }


@dataclass(frozen=True, slots=True)
class OpenAIAnswer(ABC):
    """One answer on /v1: the objects of its choices, whole or chunk by chunk.

    OpenAI's clients ignore the fields it does not know: `steering` (receipts) at the top and in each choice, and
    `generation_id` in each choice, which for streams comes in its first chunk.
    """

    model: str
    fingerprint: str
    requests: Sequence[GenerationRequest]
    id: str
    texts: TokenTexts
    n: int = 1
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, results: Sequence[Result]) -> Json:
        finished = [result.finished for result in results]
        choices = [
            {
                "index": index,
                **self._whole(index, result),
                **self._ending(result.finished),
                "generation_id": self.requests[index].id,
                **told_projections(self.requests[index], result.projections),
            }
            for index, result in enumerate(results)
        ]
        tail = {"usage": usage(finished, self.n), "steering": receipt(finished)}
        return {**self._head(self._kind), "choices": choices, **tail}

    def opening(self, index: int) -> Json:
        """The first chunk of a choice."""
        head = {"logprobs": None, "finish_reason": None, "generation_id": self.requests[index].id}
        return self._chunk(index, {**self._first(index), **head})

    def piece(self, index: int, event: Delta | PromptLogprobs) -> Json | None:
        """The chunk of an event; None if it tells nothing yet."""
        told = self._piece(index, event)
        if told is None:
            return None
        projections = event.projections if isinstance(event, Delta) else ()
        more = told_projections(self.requests[index], projections) if projections else {}
        return self._chunk(index, {**told, "finish_reason": None, **more})

    def closing(self, index: int, finished: Finished) -> Json:
        """The last chunk of a choice."""
        return self._chunk(index, {**self._last(index, finished), **self._ending(finished)})

    def usage_chunk(self, finished: Sequence[Finished]) -> Json:
        """The chunk after the last choice, for clients that asked for it."""
        return {**self._head(self._chunk_kind), "choices": [], "usage": usage(finished, self.n)}

    def with_receipt(self, chunk: Json, finished: Sequence[Finished]) -> Json:
        """The very last chunk of a stream."""
        return {**chunk, "steering": receipt(finished)}

    def _chunk(self, index: int, choice: Mapping[str, Any]) -> Json:
        return {**self._head(self._chunk_kind), "choices": [{"index": index, **choice}]}

    def _head(self, kind: str) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def _ending(self, finished: Finished) -> Json:
        return {
            "finish_reason": finished.reason,
            "stop_reason": finished.matched_stop,
            "steering": receipt([finished]),
        }

    @property
    @abstractmethod
    def _kind(self) -> str: ...

    @property
    @abstractmethod
    def _chunk_kind(self) -> str: ...

    @abstractmethod
    def _whole(self, index: int, result: Result) -> Json: ...

    @abstractmethod
    def _first(self, index: int) -> Json: ...

    @abstractmethod
    def _piece(self, index: int, event: Delta | PromptLogprobs) -> Json | None: ...

    @abstractmethod
    def _last(self, index: int, finished: Finished) -> Json: ...


@dataclass(frozen=True, slots=True)
class ChatAnswer(OpenAIAnswer):
    """A chat completion."""

    _kind = "chat.completion"
    _chunk_kind = "chat.completion.chunk"

    def _whole(self, index: int, result: Result) -> Json:
        message = {"role": "assistant", "content": result.text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(index, result.logprobs)}

    def _first(self, index: int) -> Json:
        return {"delta": {"role": "assistant", "content": ""}}

    def _piece(self, index: int, event: Delta | PromptLogprobs) -> Json | None:
        if isinstance(event, PromptLogprobs) or not (event.text or event.logprobs or event.projections):
            return None
        return {"delta": {"content": event.text}, "logprobs": self._logprobs(index, event.logprobs)}

    def _last(self, index: int, finished: Finished) -> Json:
        return {"delta": {}, "logprobs": None}

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob]) -> Json | None:
        return chat_logprobs(self.texts, tokens) if self.requests[index].logprobs is not None else None


@dataclass(frozen=True, slots=True)
class CompletionAnswer(OpenAIAnswer):
    """A text completion; its chunks have the form of the whole. With `echoed`, the prompts' texts, each choice begins
    with its prompt. A token that ends the text without being part of it has its log-probability told, as each counted
    token has: clients take the place of a token in the list for its place in the sequence."""

    _kind = "text_completion"
    _chunk_kind = "text_completion"

    echoed: Sequence[str] | None = None
    _told: dict[int, CompletionLogprobs] = field(default_factory=dict)

    def _whole(self, index: int, result: Result) -> Json:
        request = self.requests[index]
        tokens = [*result.prompt_logprobs, *result.logprobs, *result.finished.ending]
        first = request.prompt_ids[0] if request.prompt_logprobs is not None else None
        logprobs = None if request.logprobs is None else CompletionLogprobs(self.texts).of(tokens, first=first)
        return {"text": self._prompt(index) + result.text, "logprobs": logprobs}

    def _first(self, index: int) -> Json:
        return {"text": self._prompt(index) if self.requests[index].prompt_logprobs is None else ""}

    def _piece(self, index: int, event: Delta | PromptLogprobs) -> Json | None:
        request = self.requests[index]
        told = self._told.setdefault(index, CompletionLogprobs(self.texts))
        if isinstance(event, PromptLogprobs):
            return {"text": self._prompt(index), "logprobs": told.of(event.tokens, first=request.prompt_ids[0])}
        if not (event.text or event.logprobs or event.projections):
            return None
        return {"text": event.text, "logprobs": None if request.logprobs is None else told.of(event.logprobs)}

    def _last(self, index: int, finished: Finished) -> Json:
        told = self._told.setdefault(index, CompletionLogprobs(self.texts))
        return {"text": "", "logprobs": told.of(finished.ending) if finished.ending else None}

    def _prompt(self, index: int) -> str:
        return "" if self.echoed is None else self.echoed[index // self.n]
