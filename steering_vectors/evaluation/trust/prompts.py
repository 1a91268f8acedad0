"""Prompts of the verticals: a user's message if the tokenizer has a chat template, else plain text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from steering_vectors.data.batches import Encoded
from steering_vectors.data.chat import Example, Message, Prompt, chat_template_source, encode_example, encode_text
from steering_vectors.models.limits import context_limit
from steering_vectors.models.loading import LanguageModel


@dataclass(frozen=True, slots=True)
class Reader:
    """Encodes the rows of a vertical for one model; `limit` is its context in tokens, if it has one."""

    tokenizer: PreTrainedTokenizerBase
    chat: bool
    limit: int | None

    def prompt(self, *, chat: str, plain: str) -> Prompt:
        """The prompt: `chat` as a user's message, or `plain` as it is."""
        return (Message("user", chat),) if self.chat else plain

    def answers(self, prompt: Prompt, texts: Iterable[str]) -> list[Encoded]:
        """The prompt followed by each answer, separated by a space if the prompt is plain text."""
        space = "" if self.chat else " "
        return [encode_example(self.tokenizer, Example(prompt, f"{space}{text}")) for text in texts]

    def sentence(self, text: str) -> Encoded:
        """A text of which every token is scored, including the first."""
        return encode_text(self.tokenizer, text)

    def fits(self, examples: Iterable[Encoded]) -> bool:
        return self.limit is None or all(len(ids) <= self.limit for ids, _ in examples)

    def has_room(self, prompt_tokens: int, answer_tokens: int) -> bool:
        return self.limit is None or prompt_tokens + answer_tokens <= self.limit


def reader_for(lm: LanguageModel) -> Reader:
    return Reader(lm.tokenizer, chat_template_source(lm.tokenizer) == "tokenizer", context_limit(lm))
