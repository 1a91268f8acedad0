"""What generating routes answer: receipts, usage, and OpenAI's objects, whole and in chunks.

Owns shapes only: dictionaries that are ready to be written as JSON. Knows nothing of how they are sent.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from server.engine.protocol import Finished, GenerationRequest
from server.generations import Result
from steering_vectors.mixture import Mixture

Json = dict[str, Any]


def receipt(mixture: Mixture, finished: Sequence[Finished]) -> list[Json]:
    """What was applied; `steered_tokens` is summed over the choices."""
    return mixture.receipt(sum(one.steered_tokens for one in finished))


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


@dataclass(frozen=True, slots=True)
class OpenAIAnswer(ABC):
    """One answer on /v1: the objects of its choices, whole or chunk by chunk.

    OpenAI's clients ignore the fields it does not know: `steering` (receipts) at the top and in each choice, and
    `generation_id` in each choice, which for streams comes in its first chunk.
    """

    model: str
    mixture: Mixture
    requests: Sequence[GenerationRequest]
    id: str
    n: int = 1
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, results: Sequence[Result]) -> Json:
        finished = [result.finished for result in results]
        choices = [
            {
                "index": index,
                **self._text(result.text),
                **self._ending(result.finished),
                "generation_id": self.requests[index].id,
            }
            for index, result in enumerate(results)
        ]
        tail = {"usage": usage(finished, self.n), "steering": receipt(self.mixture, finished)}
        return {**self._head(self._kind), "choices": choices, **tail}

    def opening(self, index: int) -> Json:
        """The first chunk of a choice."""
        return self._chunk(index, {**self._first(), "finish_reason": None, "generation_id": self.requests[index].id})

    def piece(self, index: int, text: str) -> Json:
        return self._chunk(index, {**self._delta(text), "finish_reason": None})

    def closing(self, index: int, finished: Finished) -> Json:
        """The last chunk of a choice."""
        return self._chunk(index, {**self._last(), **self._ending(finished)})

    def usage_chunk(self, finished: Sequence[Finished]) -> Json:
        """The chunk after the last choice, for clients that asked for it."""
        return {**self._head(self._chunk_kind), "choices": [], "usage": usage(finished, self.n)}

    def with_receipt(self, chunk: Json, finished: Sequence[Finished]) -> Json:
        """The very last chunk of a stream."""
        return {**chunk, "steering": receipt(self.mixture, finished)}

    def _chunk(self, index: int, choice: Mapping[str, Any]) -> Json:
        return {**self._head(self._chunk_kind), "choices": [{"index": index, **choice}]}

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _ending(self, finished: Finished) -> Json:
        return {
            "finish_reason": finished.reason,
            "stop_reason": finished.matched_stop,
            "logprobs": None,
            "steering": receipt(self.mixture, [finished]),
        }

    @property
    @abstractmethod
    def _kind(self) -> str: ...

    @property
    @abstractmethod
    def _chunk_kind(self) -> str: ...

    @abstractmethod
    def _text(self, text: str) -> Json: ...

    @abstractmethod
    def _first(self) -> Json: ...

    @abstractmethod
    def _delta(self, text: str) -> Json: ...

    @abstractmethod
    def _last(self) -> Json: ...


@dataclass(frozen=True, slots=True)
class ChatAnswer(OpenAIAnswer):
    """A chat completion."""

    _kind = "chat.completion"
    _chunk_kind = "chat.completion.chunk"

    def _text(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text}}

    def _first(self) -> Json:
        return {"delta": {"role": "assistant", "content": ""}}

    def _delta(self, text: str) -> Json:
        return {"delta": {"content": text}}

    def _last(self) -> Json:
        return {"delta": {}}


@dataclass(frozen=True, slots=True)
class CompletionAnswer(OpenAIAnswer):
    """A text completion; its chunks have the form of the whole."""

    _kind = "text_completion"
    _chunk_kind = "text_completion"

    def _text(self, text: str) -> Json:
        return {"text": text}

    def _first(self) -> Json:
        return {"text": ""}

    def _delta(self, text: str) -> Json:
        return {"text": text}

    def _last(self) -> Json:
        return {"text": ""}
