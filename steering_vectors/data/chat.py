"""Prompts and completions as token ids: one definition for fitting and serving.

The text of messages, and of a completion after a prompt, is plain text, whatever it contains. Plain prompts, and texts
without a prompt, are read as the tokenizer reads them, with control tokens.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from steering_vectors.data.literal_text import encode_marked, holds_control_token, marked, restored
from steering_vectors.errors import DataError, RequestError
from steering_vectors.models.tokenizers import ChatTemplate, chat_template, render, vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Role = Literal["system", "user", "assistant"]
TemplateSource = Literal["tokenizer", "fallback", "unusable"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")

# What templates may take out of a text: commands to themselves, and the thoughts before a reply.
COMMANDS = re.compile(r"/(?:no_)?think\b|/system_override\b")
THOUGHTS = re.compile(r".*(?:</[\w:]*(?:think|thought|reason)\w*>|\[/THINK\])", re.DOTALL)
ANCHORS = ("\n", ".", ")", "a", "0")  # texts before a continuation that a tokenizer may not join it to
CONTEXT = 32  # tokens before a continuation that can change how it reads


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str


Prompt = str | tuple[Message, ...] | None


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt (plain text, messages, or none) and the text that follows it."""

    prompt: Prompt
    completion: str


def chat_template_source(tokenizer: PreTrainedTokenizerBase) -> TemplateSource:
    """The renderer of messages: the tokenizer's own template, or the fallback, which joins contents by newlines.

    A template that cannot be used is neither: messages are refused with the reason.
    """
    template = chat_template(tokenizer)
    if template is None:
        return "fallback"
    return "tokenizer" if template.problem is None else "unusable"


def chat_template_sha256(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The sha256 of the template's text, or None for a tokenizer without one, or with several and no default."""
    template = chat_template(tokenizer)
    return None if template is None or not template.source else hashlib.sha256(template.source.encode()).hexdigest()


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """Render a conversation as text, with the special tokens of the template and its generation prompt.

    `template_kwargs` are variables of the template, never arguments of the renderer. Raises RequestError, with
    `param` "messages" or "chat_template_kwargs", if the template refuses them or leaves out a text.
    """
    if not messages:
        raise RequestError("messages is empty; send at least one message", param="messages")
    variables = dict(template_kwargs or {})
    template = chat_template(tokenizer)
    if template is None:
        _refuse_variables(variables, "this tokenizer has no chat template")
        return "\n".join(message.content for message in messages)
    if template.problem is not None:
        raise RequestError(template.problem, param="messages")
    reserved = {"messages", "self", *inspect.signature(tokenizer.apply_chat_template).parameters} - {"kwargs"}
    _refuse_variables(variables.keys() & reserved, "it is set by the server")
    turns = [(message.role, message.content) for message in messages]
    try:
        text = render(tokenizer, template, turns, variables=variables)
    except Exception as error:  # a template is a program and may raise anything
        message = f"the model's chat template refuses these messages: {_reason(error)}"
        raise RequestError(message, param="messages") from error
    _check_complete(template, messages, text)
    return text


def _reason(error: Exception) -> str:
    """What a template says by `raise_exception`, or Jinja of a name that is not there. The texts of other errors are
    not for whoever sent the messages: they may have paths and values of this machine."""
    from jinja2.exceptions import TemplateError, UndefinedError

    return str(error) if type(error) in (TemplateError, UndefinedError) and str(error) else type(error).__name__


def _check_complete(template: ChatTemplate, messages: Sequence[Message], text: str) -> None:
    for place, message in enumerate(messages):
        written = template.formats.get(message.role, "text") is not None
        if message.content.strip() and not (written and _contains(text, message)):
            raise RequestError(
                f"the model's chat template leaves out or changes the text of messages[{place}], whose role is "
                f"{message.role}: put the text into a user message, or choose another template with --chat-template",
                param="messages",
            )


def _contains(text: str, message: Message) -> bool:
    """Whether a rendered text has a message's, but for spaces, commands to the template, and thoughts."""
    content = message.content.strip()
    if content in text:
        return True
    forms = [
        content,
        COMMANDS.sub("", content),
        json.dumps(content)[1:-1],
        json.dumps(content, ensure_ascii=False)[1:-1],
    ]
    if message.role == "assistant":
        forms.append(THOUGHTS.sub("", content))
    squeezed = "".join(text.split())
    return any("".join(form.split()) in squeezed for form in forms)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Message],
    *,
    add_special_tokens: bool = True,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Encode a plain text or messages, with the generation prompt and never with two BOS tokens.

    Names of control tokens are control tokens in a plain text, and text in a message. `add_special_tokens` applies to
    plain texts and to the fallback only, because a template writes its own special tokens. Raises RequestError for an
    empty prompt, if the template fails, and for a token that the model does not have.
    """
    if isinstance(prompt, str):
        param, text = "prompt", prompt
        encode = _encoder(tokenizer, add_special_tokens)
    else:
        param = "messages"
        thoughts = [message.role == "assistant" for message in prompt]
        contents, marks = marked(tokenizer, [message.content for message in prompt], thoughts)
        messages = [Message(one.role, content) for one, content in zip(prompt, contents, strict=True)]
        text = render_chat(tokenizer, messages, template_kwargs=template_kwargs)
        special = add_special_tokens and chat_template(tokenizer) is None
        encode = _encoder(tokenizer, special, marks)
    if not text:
        raise RequestError(f"{param} is empty; send at least one character", param=param)
    try:
        ids = encode(text)
    except UnicodeEncodeError as error:
        raise RequestError(f"{param} contains half of a surrogate pair; send valid Unicode", param=param) from error
    except RequestError as error:
        raise RequestError(f"{param}: {error.message}", param=param) from error
    check_known(tokenizer, ids, vocabulary_of(tokenizer), param=param)
    if not ids:
        raise RequestError(f"{param} contains no token of this model; send other text", param=param)
    bos = tokenizer.bos_token_id
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def check_known(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], size: int | None, *, param: str | None = None
) -> None:
    """Raise RequestError for the first token of a text that is beyond the model's vocabulary of `size` tokens."""
    token = None if size is None else next((one for one in ids if one >= size), None)
    if token is not None:
        text = tokenizer.convert_ids_to_tokens(token)
        raise RequestError(
            f"{param or 'the text'} contains {text!r}, token {token} of the tokenizer, but the model has {size} tokens "
            "only: leave it out",
            param=param,
        )


def encode_example(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], int]:
    """Encode an example. Returns its token ids and the index of the first token of its completion.

    The ids before that index are those that the server computes from the prompt alone; without a prompt, BOS if the
    tokenizer adds it, else none. The others are the ids that the model would have generated. Without a prompt, the
    completion is a plain text. Raises RequestError if the chat template refuses the prompt, and for a token that the
    model does not have; DataError if the completion has no token, or ends in a control token.
    """
    if example.prompt is not None:
        before = encode_prompt(tokenizer, example.prompt)
    else:
        before = [token for token in _tokenize(tokenizer, "", True)[:1] if token == tokenizer.bos_token_id]
    try:
        completion = continuation(tokenizer, before, example.completion, plain=example.prompt is None)
    except UnicodeEncodeError as error:
        raise DataError("the completion contains half of a surrogate pair; correct or remove the row") from error
    except RequestError as error:
        raise DataError(error.message) from error
    if not completion:
        raise DataError(f"the completion {example.completion!r} contains no token of this model; remove the row")
    return before + completion, len(before)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], int]:
    """Encode a text so that its first token can be scored. Returns the ids and the index of that token.

    If the tokenizer adds no BOS, its BOS is put before the text, or its EOS if it has no BOS.
    """
    ids, start = encode_example(tokenizer, Example(None, text))
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return (ids, start) if start or first is None else ([first, *ids], 1)


def decoded_after(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text that token ids add to a prompt: decode(before + ids) without decode(before), special tokens skipped.

    Spaces are not cleaned up. Where the ids change how the prompt's end reads (they complete a character, say), the
    text is what follows the longest common prefix. Bytes that are not UTF-8 become U+FFFD; nothing raises.
    """
    return text_after(decoded(tokenizer, before), decoded(tokenizer, [*before, *ids]))


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return cast(str, tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def text_after(before: str, whole: str) -> str:
    """`whole` without its longest common prefix with `before`."""
    if whole.startswith(before):
        return whole[len(before) :]
    pairs = enumerate(zip(before, whole, strict=False))
    return whole[next((place for place, (old, new) in pairs if old != new), len(whole)) :]


def _refuse_variables(names: Collection[str], reason: str) -> None:
    if names:
        raise RequestError(
            f"chat_template_kwargs cannot set {min(names)!r}: {reason}; leave it out", param="chat_template_kwargs"
        )


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> list[int]:
    text.encode()  # raises on lone surrogates, which tokenizers answer with a TypeError
    return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])


def _encoder(
    tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool, marks: Mapping[str, str] | None = None
) -> Callable[[str], list[int]]:
    if not marks:
        return lambda text: _tokenize(tokenizer, text, add_special_tokens)

    def encode(text: str) -> list[int]:
        text.encode()
        return encode_marked(tokenizer, text, marks, add_special_tokens=add_special_tokens)

    return encode


def continuation(
    tokenizer: PreTrainedTokenizerBase, before: Sequence[int], text: str, *, plain: bool = False
) -> list[int]:
    """Encode `text` as the model would generate it after `before`.

    What is decoded from both is the concatenated text, if any of the tokenizations that are tried has that property:
    many tokenizers put a space before every text, which belongs to the text's start only. Names of control tokens are
    text, but in a `plain` text they are control tokens. Raises RequestError for a token that the model does not have,
    and for a text that ends in a control token, where it is unclear which of both is meant.
    """
    text.encode()
    encode = _encoder(tokenizer, False)
    if not plain and holds_control_token(tokenizer, text):
        _refuse_ending(tokenizer, text)
        (content,), marks = marked(tokenizer, [text], [False])
        text, encode = content, _encoder(tokenizer, False, marks)
    else:
        marks = {}
    wanted = restored(text, marks)
    context = list(before[-CONTEXT:])
    if not decoded(tokenizer, context):
        context = list(before)
    tried: list[tuple[list[int], str]] = []
    for ids in _tokenizations(tokenizer, encode, before, text):
        shown = decoded_after(tokenizer, context, ids)
        if shown == wanted:
            break
        tried.append((ids, shown))
    else:  # the tokenizer changes texts: only the space at the start is compared
        spaces = _leading_spaces(wanted)
        alike = (ids for ids, shown in tried if ids and _leading_spaces(shown) == spaces)
        ids = next(alike, tried[0][0])
    check_known(tokenizer, ids, vocabulary_of(tokenizer))
    return ids


def _tokenizations(
    tokenizer: PreTrainedTokenizerBase, encode: Callable[[str], list[int]], before: Sequence[int], text: str
) -> Iterator[list[int]]:
    """Ways to encode a text that goes on after other tokens, the best first."""
    yield encode(text)
    if text.startswith(" "):
        yield encode(text[1:])
    for anchor in (*ANCHORS, decoded(tokenizer, before)):
        start, whole = encode(anchor), encode(anchor + text)
        if whole[: len(start)] == start:
            yield whole[len(start) :]


def _leading_spaces(text: str) -> int:
    return len(text) - len(text.lstrip())


def _refuse_ending(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    template = chat_template(tokenizer)
    ends = {tokenizer.eos_token, tokenizer.pad_token, None if template is None else template.end_of_turn}
    for end in sorted(end for end in ends if end):
        if text.rstrip().endswith(end):
            raise RequestError(
                f"the completion ends in {end!r}, the name of a control token: remove it, because a completion's end "
                "is not part of its text"
            )
