"""One row of preference data: its columns in each of the three formats, as texts, messages or HH-RLHF transcripts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from steering_vectors.data.chat import ROLES, Example, Message, Prompt
from steering_vectors.data.preferences import Kind
from steering_vectors.data.tables import BadRow

COLUMNS: dict[Kind, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "unpaired": ("completion", "label"),
    "contrast": ("positive", "negative"),
}
PROMPT = "prompt"
LABELS = {"true": True, "1": True, "false": False, "0": False}
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}

Cells = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Record:
    """One row: an example for each side, and the form of its texts, which must be the same in all rows of a file."""

    positive: Example | None
    negative: Example | None
    form: str


def read_record(kind: Kind, cells: Cells) -> Record:
    """Read the cells of a row, by the format's column names. Raises BadRow, which names the column."""
    if kind == "unpaired":
        example, form = _example(cells, "completion", True)
        return Record(example, None, form) if read_label(cells) else Record(None, example, form)
    if kind == "contrast" and PROMPT in cells:
        raise BadRow(
            "positive and negative are whole texts; to use the prompt, rename the columns to chosen and rejected",
            PROMPT,
        )
    wanted, other = COLUMNS[kind]
    transcripts = kind == "preference"
    positive, form = _example(cells, wanted, transcripts)
    negative, other_form = _example(cells, other, transcripts)
    if form != other_form:
        raise BadRow(f"it contains {other_form}, but {wanted} contains {form}; use one form", other)
    if transcripts and positive.prompt != negative.prompt:
        raise BadRow(f"the transcripts of {wanted} and {other} differ before the last reply", other)
    if positive == negative:
        raise BadRow(f"{wanted} and {other} are equal, so nothing is preferred", other)
    return Record(positive, negative, form)


def read_label(cells: Cells) -> bool:
    """Read the label of a row: true or false, 1 or 0. Raises BadRow."""
    value = _cell(cells, "label")
    label = LABELS.get(str(value).strip().lower())
    if label is None:
        raise BadRow(f"{value!r} is not a label; use true or false, or 1 or 0", "label")
    return label


def _example(cells: Cells, column: str, transcripts: bool) -> tuple[Example, str]:
    """The example in one column with its prompt, and the form of both."""
    value, prompt = _cell(cells, column), read_prompt(cells)
    suffix = {type(None): "", str: " and a prompt as text", tuple: " and a prompt of messages"}[type(prompt)]
    if isinstance(value, list):
        return _with_prompt(_messages(value, column), prompt, column), f"messages{suffix}"
    text = _string(value, column)
    if transcripts and prompt is None and HH_TURN.match(text):
        return _with_prompt(_turns(text, column), None, column), "HH-RLHF transcripts"
    return Example(prompt, text), f"text{suffix}"


def read_prompt(cells: Cells) -> Prompt:
    """Read the prompt of a row, a text or messages; None without the column. Raises BadRow."""
    if PROMPT not in cells:
        return None
    value = cells[PROMPT]
    if not isinstance(value, list):
        return _string(value, PROMPT)
    messages = _messages(value, PROMPT)
    _check_open(messages, PROMPT)
    return messages


def _with_prompt(messages: tuple[Message, ...], prompt: Prompt, column: str) -> Example:
    """Split messages into prompt and reply. Messages before the reply must match an explicit prompt."""
    *before, reply = messages
    head = tuple(before)
    if reply.role != "assistant":
        raise BadRow(f"the role of the last message must be assistant, not {reply.role}", column)
    _check_open(head, column)
    if prompt is None or not head:
        asked = (Message("user", prompt),) if isinstance(prompt, str) else prompt
        return Example(head or asked, reply.content)
    if prompt not in (head, head[-1].content):
        raise BadRow("it must be the reply alone, or begin with the messages of the prompt", column)
    return Example(head, reply.content)


def _check_open(messages: tuple[Message, ...], column: str) -> None:
    if messages and messages[-1].role == "assistant":
        raise BadRow("the role of the message before the reply must not be assistant", column)


def _messages(value: list[Any], column: str) -> tuple[Message, ...]:
    if not value:
        raise BadRow("it is an empty list of messages", column)
    messages = []
    for index, one in enumerate(value):
        place = f"{column}[{index}]"
        if not isinstance(one, dict):
            raise BadRow(f"a message must be an object with role and content, not {type(one).__name__}", place)
        if unknown := sorted(key for key, held in one.items() if key not in ("role", "content") and held is not None):
            raise BadRow(f"a message has role and content only, not {unknown[0]!r}", place)
        if (role := one.get("role")) not in ROLES:
            raise BadRow(f"{role!r} is not a role; use {', '.join(ROLES)}", f"{place}.role")
        messages.append(Message(role, _string(one.get("content"), f"{place}.content")))
    return tuple(messages)


def _turns(text: str, column: str) -> tuple[Message, ...]:
    """Read an HH-RLHF transcript, whose turns begin with a blank line and 'Human:' or 'Assistant:'."""
    parts = HH_TURN.split(text)[1:]
    turns = []
    for number, (speaker, content) in enumerate(zip(parts[::2], parts[1::2], strict=True), start=1):
        if not content.strip():
            raise BadRow(f"turn {number} of the transcript ({HH_ROLES[speaker]}) is empty", column)
        turns.append({"role": HH_ROLES[speaker], "content": content.strip()})
    return _messages(turns, column)


def _cell(cells: Cells, column: str) -> Any:
    if column not in cells:
        raise BadRow("it is missing; if the column has another name, name it in columns", column)
    return cells[column]


def _string(value: Any, place: str) -> str:
    if value is None or value != value or value == "":
        raise BadRow("it is empty", place)
    if not isinstance(value, str):
        raise BadRow(f"it must be text, not {type(value).__name__}", place)
    if not value.strip():
        raise BadRow("it contains only whitespace", place)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow("it contains half of a surrogate pair, which is not valid Unicode", place) from error
    return value
