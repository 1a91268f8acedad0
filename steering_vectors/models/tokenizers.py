"""What a tokenizer says besides token ids: its chat template, its control tokens, and the vocabulary of its model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast
from weakref import WeakKeyDictionary

from steering_vectors.errors import ModelError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ContentFormat = Literal["text", "parts"]
Turn = tuple[str, str]  # role and content
Render = Callable[[Sequence[Turn], bool], str]  # the bool asks for a generation prompt

SYSTEM, USER, REPLY, NEXT = PROBES = ("Zqsystem", "Zquser", "Zqreply", "Zqnext")
ASKED: tuple[Turn, ...] = (("user", USER),)
ANSWERED: tuple[Turn, ...] = (*ASKED, ("assistant", REPLY))
CONVERSATIONS: Mapping[str, tuple[Turn, ...]] = {
    "user": ASKED,
    "system": (("system", SYSTEM), *ASKED),
    "assistant": (*ANSWERED, ("user", NEXT)),
}

_VOCABULARIES: WeakKeyDictionary[PreTrainedTokenizerBase, int] = WeakKeyDictionary()


def set_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Note how many tokens the tokenizer's model has; the tokenizer may know more."""
    _VOCABULARIES[tokenizer] = size


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The number of tokens of the model that the tokenizer was loaded with; None for a tokenizer without a model."""
    return _VOCABULARIES.get(tokenizer)


def choose_template(tokenizer: PreTrainedTokenizerBase, choice: str) -> None:
    """Use another chat template: the name of one of the tokenizer's, or a file in Jinja. Raises ModelError."""
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if choice in named:
        tokenizer.chat_template = named[choice]
        return
    names = ", ".join(sorted(named)) or "none"
    try:
        text = Path(choice).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ModelError(
            f"the chat template {choice!r} is neither one of the tokenizer's (named ones: {names}) nor a file that can "
            f"be read ({reason})"
        ) from error
    if not text.strip():
        raise ModelError(f"the chat template {choice} is empty")
    tokenizer.chat_template = text


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A chat template, and what it does with a few short conversations.

    `formats` has the form of content that it writes for each role, None for a role whose text it leaves out. `header`
    is what it writes before a reply, if it ignores the request for a generation prompt. `end_of_turn` is the added
    token that it writes after a reply. `problem` says why the template cannot be used, with the remedy.
    """

    source: str
    formats: Mapping[str, ContentFormat | None]
    header: str = ""
    end_of_turn: str | None = None
    written: frozenset[str] = frozenset()  # the added tokens between the turns of a conversation
    problem: str | None = None

    def content(self, role: str, text: str) -> Any:
        return _content(text, self.formats.get(role))


REMEDY = "choose another with --chat-template, or send plain text"


@dataclass(frozen=True, slots=True)
class _Reading:
    """What was read from a tokenizer with this template and this many tokens."""

    stated: Any
    tokens: int
    template: ChatTemplate | None
    control_tokens: frozenset[str]


_READINGS: WeakKeyDictionary[PreTrainedTokenizerBase, _Reading] = WeakKeyDictionary()


def _reading(tokenizer: PreTrainedTokenizerBase) -> _Reading:
    stated, tokens = tokenizer.chat_template, len(tokenizer)
    known = _READINGS.get(tokenizer)
    if known is None or known.stated != stated or known.tokens != tokens:
        template = _read(tokenizer) if stated else None
        written = frozenset() if template is None else template.written
        controls = frozenset(text for text, special in added_tokens(tokenizer).items() if special or text in written)
        known = _Reading(dict(stated) if isinstance(stated, dict) else stated, tokens, template, controls)
        _READINGS[tokenizer] = known
    return known


def chat_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """The tokenizer's chat template; None without one, or with an empty one. Kept for each tokenizer."""
    return _reading(tokenizer).template


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The texts of the tokens that structure a conversation: special tokens, and those between a template's turns.
    Kept for each tokenizer."""
    return _reading(tokenizer).control_tokens


def render(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    turns: Sequence[Turn],
    *,
    generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The text that a template writes. May raise anything: a template is a program."""
    messages = [{"role": role, "content": template.content(role, text)} for role, text in turns]
    text = cast(
        str,
        tokenizer.apply_chat_template(
            messages,
            chat_template=template.source,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **(variables or {}),
        ),
    )
    return text + template.header if generation_prompt else text


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """The texts that become one token wherever they stand, and whether each is a special token."""
    special = set(tokenizer.all_special_tokens)
    added = {str(token): bool(token.special) for token in tokenizer.added_tokens_decoder.values()}
    found = {**dict.fromkeys(special, True), **{text: known or text in special for text, known in added.items()}}
    return {text: known for text, known in found.items() if len(text) > 1 and not text.isspace()}


def _content(text: str, form: ContentFormat | None) -> Any:
    return [{"type": "text", "text": text}] if form == "parts" else text


def _read(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """Render short conversations to see what the template does."""
    try:
        source = str(tokenizer.get_chat_template())
    except ValueError:
        names = ", ".join(sorted(tokenizer.chat_template))
        problem = (
            f"the model has several chat templates ({names}) and none called 'default': "
            "choose one with --chat-template NAME, or send plain text"
        )
        return ChatTemplate("", {}, problem=problem)
    if error := _syntax_error(tokenizer, source):
        return ChatTemplate(source, {}, problem=f"the model's chat template is not valid Jinja ({error}): {REMEDY}")
    formats: dict[str, ContentFormat | None] = {}
    for role in CONVERSATIONS:
        formats[role] = _format(tokenizer, source, role, formats)
    if formats["user"] is None:
        problem = f"the model's chat template leaves out the text of user messages: {REMEDY}"
        return ChatTemplate(source, formats, problem=problem)
    plain = ChatTemplate(source, formats)

    def written(turns: Sequence[Turn], prompt: bool = False) -> str:
        try:
            return render(tokenizer, plain, turns, generation_prompt=prompt)
        except Exception:  # real messages meet the same error, and it is reported then
            return ""

    added = added_tokens(tokenizer)
    between = written(CONVERSATIONS["assistant"])
    return ChatTemplate(
        source,
        formats,
        _header(written(ASKED), written(ASKED, True), written(ANSWERED)),
        _end_of_turn(written(ANSWERED), added, tokenizer.bos_token),
        frozenset(text for text in added if text in between),
    )


def _syntax_error(tokenizer: PreTrainedTokenizerBase, source: str) -> str | None:
    from jinja2 import TemplateSyntaxError

    try:
        render(tokenizer, ChatTemplate(source, {}), ASKED)
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {first_line(error)}"
    except Exception:  # for other reasons, which real messages may not give
        return None
    return None


def _format(
    tokenizer: PreTrainedTokenizerBase, source: str, role: str, known: Mapping[str, ContentFormat | None]
) -> ContentFormat | None:
    """The form in which the content of a role is written; None if the template writes it in neither."""
    turns = CONVERSATIONS[role]
    (probe,) = (text for one, text in turns if one == role and text != NEXT)
    forms: tuple[ContentFormat, ...] = ("text", "parts")
    failed = False
    for form in forms:
        try:
            text = render(tokenizer, ChatTemplate(source, {**known, role: form}), turns, generation_prompt=False)
        except Exception:
            failed = True
            continue
        if probe in text and f"'{probe}'}}" not in text:  # else it prints the list of parts as Python does
            return form
    return "text" if failed else None  # a template that refuses a role says so when it meets one


def _header(asked: str, prompted: str, answered: str) -> str:
    """What stands before a reply, if the prompt lacks it because the template ignores `add_generation_prompt`."""
    if USER not in asked or asked != prompted or REPLY not in answered or not answered.startswith(asked):
        return ""
    header = answered[len(asked) : answered.index(REPLY)]
    return header if header.strip() and USER not in header else ""


def _end_of_turn(answered: str, added: Collection[str], bos: str | None) -> str | None:
    """The added token right after a reply, unless it begins the next turn."""
    if USER not in answered or REPLY not in answered:
        return None
    before, after = answered[: answered.index(USER)], answered[answered.index(REPLY) + len(REPLY) :].lstrip()
    opening = max(added, key=before.rfind, default=None)
    ends = [text for text in added if after.startswith(text) and text != bos]
    token = max(ends, key=len, default=None)
    return None if token is not None and token == opening and token in before else token
