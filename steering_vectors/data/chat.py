"""Chat templates, BOS tokens, and where a prompt ends: one definition for fitting and serving."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from steering_vectors.errors import DataError, ModelError, RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Role = Literal["system", "user", "assistant"]
TemplateSource = Literal["tokenizer", "fallback"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


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
    """The renderer of messages: the tokenizer's own template, or the fallback, which joins contents by newlines."""
    return "fallback" if _template(tokenizer) is None else "tokenizer"


def chat_template_sha256(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The sha256 of the template's text, or None for a tokenizer without one."""
    template = _template(tokenizer)
    return None if template is None else hashlib.sha256(template.encode()).hexdigest()


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """Render a conversation as text, with the special tokens of the template and its generation prompt.

    `template_kwargs` are variables of the template, never arguments of the renderer. Raises RequestError, with
    `param` "messages" or "chat_template_kwargs", if the template refuses them.
    """
    if not messages:
        raise RequestError("messages is empty; send at least one message", param="messages")
    variables = dict(template_kwargs or {})
    if _template(tokenizer) is None:
        _refuse_variables(variables, "this tokenizer has no chat template")
        return "\n".join(message.content for message in messages)
    reserved = {"messages", "self", *inspect.signature(tokenizer.apply_chat_template).parameters} - {"kwargs"}
    _refuse_variables(variables.keys() & reserved, "it is set by the server")
    try:
        text = tokenizer.apply_chat_template(
            [asdict(message) for message in messages], tokenize=False, add_generation_prompt=True, **variables
        )
    except Exception as error:  # a template is a program and may raise anything
        reason = str(error) or type(error).__name__
        raise RequestError(f"the model's chat template refuses these messages: {reason}", param="messages") from error
    return cast(str, text)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Message],
    *,
    add_special_tokens: bool = True,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Encode a plain text or messages, with the generation prompt and never with two BOS tokens.

    `add_special_tokens` applies to plain texts and to the fallback only, because a template writes its own special
    tokens. Raises RequestError for an empty prompt, and if the template fails.
    """
    if isinstance(prompt, str):
        param, text, special = "prompt", prompt, add_special_tokens
    else:
        param, text = "messages", render_chat(tokenizer, prompt, template_kwargs=template_kwargs)
        special = add_special_tokens and _template(tokenizer) is None
    if not text:
        raise RequestError(f"{param} is empty; send at least one character", param=param)
    try:
        ids = _tokenize(tokenizer, text, special)
    except UnicodeEncodeError as error:
        raise RequestError(f"{param} contains half of a surrogate pair; send valid Unicode", param=param) from error
    if not ids:
        raise RequestError(f"{param} contains no token of this model; send other text", param=param)
    bos = tokenizer.bos_token_id
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def encode_example(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], int]:
    """Encode an example. Returns its token ids and the index of the first token of its completion.

    The ids before that index are those that the server computes from the prompt alone; without a prompt, BOS if the
    tokenizer adds it, else none. The others are the ids that the model would have generated. Raises RequestError if the
    chat template refuses the prompt, DataError if the completion has no token.
    """
    if example.prompt is not None:
        before = encode_prompt(tokenizer, example.prompt)
    else:
        before = [token for token in _tokenize(tokenizer, "", True)[:1] if token == tokenizer.bos_token_id]
    try:
        completion = continuation(tokenizer, before, example.completion)
    except UnicodeEncodeError as error:
        raise DataError("the completion contains half of a surrogate pair; correct or remove the row") from error
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


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    if not tokenizer.chat_template:
        return None
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        names = ", ".join(sorted(tokenizer.chat_template))
        raise ModelError(
            f"the tokenizer has several chat templates ({names}) and none called 'default'; "
            "rename one of them in its tokenizer_config.json"
        ) from error


def _refuse_variables(names: Collection[str], reason: str) -> None:
    if names:
        raise RequestError(
            f"chat_template_kwargs cannot set {min(names)!r}: {reason}; leave it out", param="chat_template_kwargs"
        )


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> list[int]:
    text.encode()  # raises on lone surrogates, which tokenizers answer with a TypeError
    return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])


def continuation(tokenizer: PreTrainedTokenizerBase, before: list[int], text: str) -> list[int]:
    """Encode `text` as the model would generate it after `before`.

    SentencePiece-like tokenizers add a space before every text, so a text that begins with a space would get two. The
    text's own space is left out if the ids then still decode to the text.
    """
    ids = _tokenize(tokenizer, text, False)
    if not text.startswith(" ") or decoded_after(tokenizer, before, ids) == text:
        return ids
    shorter = _tokenize(tokenizer, text[1:], False)
    return shorter if decoded_after(tokenizer, before, shorter) == text else ids
