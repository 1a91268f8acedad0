"""Log-probabilities in the shapes of OpenAI's two routes.

Owns these shapes and their conventions: `-inf` is not JSON and becomes -9999, a prompt's first token has none, offsets
count characters from the start of the choice's text. Knows nothing of requests or streams.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from server.engines.protocol import TokenLogprob
from server.generation.token_texts import TokenTexts

NEVER = -9999.0
Json = dict[str, Any]


def chat_logprobs(texts: TokenTexts, tokens: Sequence[TokenLogprob]) -> Json:
    """A chat choice's `logprobs`."""
    content = [
        {
            **_chat_token(texts, one.token_id, one.logprob),
            "top_logprobs": [_chat_token(texts, *pair) for pair in one.top],
        }
        for one in tokens
    ]
    return {"content": content, "refusal": None}


def _chat_token(texts: TokenTexts, token_id: int, logprob: float) -> Json:
    value = texts.bytes_of(token_id)
    return {"token": texts.text_of(token_id), "logprob": finite(logprob), "bytes": list(value)}


class CompletionLogprobs:
    """A completion choice's `logprobs`, piece by piece: offsets go on from one to the next."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._place = 0

    def of(self, tokens: Sequence[TokenLogprob], *, first: int | None = None) -> Json:
        """`first` is the prompt's first token, ahead of the others."""
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
        """The likeliest tokens and the chosen one; of tokens that read alike the likelier counts."""
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
    return max(logprob, NEVER)
