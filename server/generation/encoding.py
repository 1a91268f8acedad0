"""From what a client wrote to the token ids that the engine is given.

Owns when tokenising leaves the event loop: a long text would hold up every stream. Knows nothing of templates, which
are `steering_vectors.data.chat`'s, or of the engine's limits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from server.engines.detokenizer import decode_text
from steering_vectors.data.chat import Message, continuation, encode_prompt
from steering_vectors.errors import RequestError

Prompt = str | list[int] | tuple[Message, ...]
LONG_TEXT = 8192  # characters; below it a thread costs more than tokenising does


class Encoding(Protocol):
    """What decides how a prompt becomes token ids, besides the prompt itself."""

    @property
    def add_special_tokens(self) -> bool: ...

    @property
    def chat_template_kwargs(self) -> Mapping[str, Any]: ...


@contextmanager
def naming_field(prompt: Prompt) -> Iterator[None]:
    """What is wrong with a prompt is said of the field that holds it, `messages` where it is a conversation."""
    try:
        yield
    except RequestError as error:
        if error.param == "prompt" and isinstance(prompt, tuple):
            error.param = "messages"
        raise


async def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, encoding: Encoding) -> tuple[int, ...]:
    """Token ids of a text or of messages; token ids pass as they are. Raises RequestError."""
    if isinstance(prompt, list):
        return tuple(prompt)

    def work() -> tuple[int, ...]:
        ids = encode_prompt(
            tokenizer,
            prompt,
            add_special_tokens=encoding.add_special_tokens,
            template_kwargs=encoding.chat_template_kwargs,
        )
        return tuple(ids)

    return await asyncio.to_thread(work) if _length(prompt) > LONG_TEXT else work()


async def encode_continuations(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    completions: Sequence[str | list[int]],
    encoding: Encoding,
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Token ids of a prompt, and of each completion as the model would write it there. Raises RequestError, also for
    a completion without a token."""
    before = await encode(tokenizer, prompt, encoding)

    def work() -> list[tuple[int, ...]]:
        try:
            return [
                tuple(one) if isinstance(one, list) else tuple(continuation(tokenizer, list(before), one))
                for one in completions
            ]
        except UnicodeEncodeError as error:
            raise RequestError(
                "completions holds half of a surrogate pair, which is no character", param="completions"
            ) from error

    found = await asyncio.to_thread(work)
    if empty := [place for place, ids in enumerate(found) if not ids]:
        raise RequestError(f"completions[{empty[0]}] holds no token of this model", param=f"completions[{empty[0]}]")
    return before, found


def check_completions(completions: Sequence[Sequence[int]], vocabulary: int) -> None:
    """Raise RequestError that names the first completion with an id outside of the vocabulary."""
    for place, ids in enumerate(completions):
        if not all(0 <= token < vocabulary for token in ids):
            field = f"completions[{place}]"
            raise RequestError(f"{field} has a token id outside of the vocabulary, 0 to {vocabulary - 1}", param=field)


def echo(tokenizer: PreTrainedTokenizerBase, prompt: str | list[int]) -> str:
    """The text of a prompt, as it begins an answer that repeats it."""
    return prompt if isinstance(prompt, str) else decode_text(tokenizer, (), prompt)


def _length(prompt: str | tuple[Message, ...]) -> int:
    return len(prompt) if isinstance(prompt, str) else sum(len(message.content) for message in prompt)
