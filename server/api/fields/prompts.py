"""The forms of a prompt: text, token ids, and messages of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from server.api.fields.body import FAIL_FAST, Body, NoOps, OrElse, TimedBody
from steering_vectors.data.chat import Message
from steering_vectors.errors import RequestError

MAX_MESSAGES = 4096
TOKEN_IDS = {"type": "array", "items": {"type": "integer"}}
TEXT_OR_IDS = "a string or a list of token ids"


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _one_prompt(value: Any) -> Any:
    if not isinstance(value, str) and not _is_ids(value):
        raise PydanticCustomError("prompt_type", "it must be " + TEXT_OR_IDS + ", and not empty")
    return value


def _many_prompts(value: Any) -> Any:
    if isinstance(value, str) or _is_ids(value):
        return [value]
    if isinstance(value, list) and value and (all(map(_is_ids, value)) or all(isinstance(one, str) for one in value)):
        return value
    raise PydanticCustomError("prompt_type", "it must be " + TEXT_OR_IDS + ", or a list of either, and not empty")


def _joined_parts(content: Any) -> Any:
    """The text of a list of content parts, joined by newlines; parts of other types are refused."""
    if not isinstance(content, list):
        return content
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise PydanticCustomError(
                "unsupported_content", "a content part of type {kind} is not supported, only text", {"kind": repr(kind)}
            )
        stated = {name for name, value in part.items() if value is not None}
        if stated != {"type", "text"} or not isinstance(part["text"], str):
            raise PydanticCustomError("content_part", "a text part is an object of type and text, nothing else")
    return "\n".join(part["text"] for part in content)


OnePrompt = Annotated[str | Annotated[list[int], FAIL_FAST], BeforeValidator(_one_prompt)]
ManyPrompts = Annotated[
    Annotated[list[str], FAIL_FAST] | Annotated[list[Annotated[list[int], FAIL_FAST]], FAIL_FAST],
    BeforeValidator(_many_prompts),
    OrElse({"type": "string"}),
    OrElse(TOKEN_IDS),
]
PARTS = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["type", "text"],
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    },
}
Content = Annotated[str, BeforeValidator(_joined_parts), OrElse(PARTS)]


class MessageBody(Body):
    """One turn. `developer` is a newer name of `system`."""

    no_ops: ClassVar[NoOps] = {
        "annotations": ([],),
        "audio": (),
        "cache_control": (),
        "function_call": ({},),
        "name": ("",),
        "reasoning": ("",),
        "reasoning_content": ("",),
        "refusal": ("",),
        "tool_call_id": ("",),
        "tool_calls": ([],),
    }

    role: Literal["system", "developer", "user", "assistant"] = Field(description="The author.")
    content: Content = Field(description="A text, or a list of text parts, which are joined by newlines.")


Messages = Annotated[list[MessageBody], Field(max_length=MAX_MESSAGES, fail_fast=True)]


class EncodingBody(TimedBody):
    """How a prompt becomes token ids."""

    add_special_tokens: bool = Field(
        True, description="Let the tokenizer add special tokens, such as BOS, to a plain text."
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Variables for the chat template.", examples=[{"enable_thinking": False}]
    )

    def encoding(self) -> dict[str, Any]:
        return {"add_special_tokens": self.add_special_tokens, "template_kwargs": self.chat_template_kwargs}


class OnePromptBody(EncodingBody):
    """A prompt, as text, token ids or messages."""

    prompt: OnePrompt | None = Field(None, description="A text or token ids. Exclusive with `messages`.")
    messages: Messages | None = Field(None, description="A conversation. Exclusive with `prompt`.")

    def the_prompt(self) -> str | list[int] | tuple[Message, ...]:
        """Raises RequestError unless there is exactly one of prompt and messages."""
        if self.prompt is not None and self.messages is None:
            return self.prompt
        if self.messages is not None and self.prompt is None:
            return messages_of(self.messages)
        problem = "neither is" if self.prompt is None else "both are"
        raise RequestError(f"send either prompt or messages: {problem} given", param="prompt")


def messages_of(bodies: Sequence[MessageBody]) -> tuple[Message, ...]:
    return tuple(Message("system" if one.role == "developer" else one.role, one.content) for one in bodies)
