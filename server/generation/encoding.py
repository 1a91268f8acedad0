"""From what a client wrote to token ids. Long texts are tokenised in a thread, where they hold up no stream."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from steering_vectors.data.chat import Message, continuation, encode_prompt
from steering_vectors.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]
Prompt = str | list[int] | tuple[Message, ...]
LONG_TEXT = 8192  # characters; below it a thread costs more than tokenising does


class Encoding(Protocol):
    """What decides how a prompt becomes token ids, besides the prompt itself."""

    @property
    def add_special_tokens(self) -> bool: ...

    @property
    def chat_template_kwargs(self) -> Mapping[str, Any]: ...


async def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, encoding: Encoding) -> Ids:
    """Token ids of a text or of messages; token ids pass as they are. Raises RequestError."""
    if isinstance(prompt, list):
        return tuple(prompt)

    def work() -> Ids:
        ids = encode_prompt(
            tokenizer,
            prompt,
            add_special_tokens=encoding.add_special_tokens,
            template_kwargs=encoding.chat_template_kwargs,
        )
        return tuple(ids)

    return await asyncio.to_thread(work) if _length(prompt) > LONG_TEXT else work()


async def encode_continuations(
    tokenizer: PreTrainedTokenizerBase, prompt: Ids, completions: Sequence[str | list[int]], vocab_size: int
) -> list[Ids]:
    """Token ids of each completion as the model would write it after the prompt. Raises RequestError that names a
    completion without a token, or with an id outside of the vocabulary."""

    def work() -> list[Ids]:
        try:
            return [
                tuple(one) if isinstance(one, list) else tuple(continuation(tokenizer, list(prompt), one))
                for one in completions
            ]
        except UnicodeEncodeError as error:
            raise RequestError(
                "completions has a lone surrogate, which is not a character", param="completions"
            ) from error

    found = await asyncio.to_thread(work)
    for place, ids in enumerate(found):
        name = f"completions[{place}]"
        if not ids:
            raise RequestError(f"{name} holds no token of this model", param=name)
        if not all(0 <= token < vocab_size for token in ids):
            raise RequestError(f"{name} has a token id outside of the vocabulary, 0 to {vocab_size - 1}", param=name)
    return found


def _length(prompt: str | tuple[Message, ...]) -> int:
    return len(prompt) if isinstance(prompt, str) else sum(len(message.content) for message in prompt)
