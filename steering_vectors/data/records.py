"""One row of preference data: its columns in each of the three formats, as texts, messages or HH-RLHF transcripts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from steering_vectors.data.cells import (
    is_absent,
    is_blank,
    read_cell,
    read_label,
    read_messages,
    read_text,
    read_transcript,
)
from steering_vectors.data.chat import Example, Message, Prompt
from steering_vectors.data.preferences import Kind
from steering_vectors.data.tables import BadRow

COLUMNS: dict[Kind, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "unpaired": ("completion", "label"),
    "contrast": ("positive", "negative"),
}
PROMPT, SYSTEM, WEIGHT = "prompt", "system", "weight"
CHAT, REPLY, PLAIN = "chat messages", "a message without a prompt", "plain text"

Cells = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Record:
    """One row: an example for each side, their form, and how much the row counts. The chat template renders all rows of
    a file, or none."""

    positive: Example | None
    negative: Example | None
    form: str
    weight: float = 1.0

    @property
    def chat(self) -> bool:
        return self.form == CHAT


def read_record(kind: Kind, cells: Cells) -> Record:
    """Read the cells of a row, by the format's column names. Raises BadRow, which names the column.

    A cell of the system prompt, also an empty one, makes a plain prompt a user message.
    """
    weight = _weight(cells[WEIGHT]) if WEIGHT in cells else 1.0
    if kind == "unpaired":
        example, form = _example(cells, "completion", True)
        return Record(example, None, form, weight) if read_label(cells) else Record(None, example, form, weight)
    if kind == "contrast" and not is_absent(cells.get(PROMPT)):
        raise BadRow(
            "positive and negative are whole texts; to use the prompt, rename the columns to chosen and rejected",
            PROMPT,
        )
    wanted, other = COLUMNS[kind]
    transcripts = kind == "preference"
    positive, form = _example(cells, wanted, transcripts)
    negative, other_form = _example(cells, other, transcripts)
    if (form == CHAT) != (other_form == CHAT):
        raise BadRow(f"it contains {other_form}, but {wanted} contains {form}; use one form", other)
    if transcripts and positive.prompt != negative.prompt:
        raise BadRow(f"the transcripts of {wanted} and {other} differ before the last reply", other)
    if positive == negative:
        raise BadRow(f"{wanted} and {other} are equal, so nothing is preferred", other)
    return Record(positive, negative, form, weight)


def read_prompt(cells: Cells) -> Prompt:
    """Read the prompt of a row, a text or messages; None if it is absent. Raises BadRow, also for an empty text."""
    value = cells.get(PROMPT)
    if is_absent(value) and value != "":
        return None
    messages = read_messages(value, PROMPT)
    if messages is None:
        return read_text(value, PROMPT)
    _check_open(messages, PROMPT)
    return messages


def _weight(value: Any) -> float:
    """How much a row counts. Raises BadRow unless it is a positive number, which may be written as a text."""
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if isinstance(value, bool) or not 0 < weight < math.inf:
        raise BadRow("it must be a positive number", WEIGHT)
    return weight


def begins_with_system(prompt: Prompt) -> bool:
    return isinstance(prompt, tuple) and prompt[0].role == "system"


def _example(cells: Cells, column: str, transcripts: bool) -> tuple[Example, str]:
    """The example in one column with its prompt, and its form."""
    value, prompt = read_cell(cells, column), read_prompt(cells)
    messages = read_messages(value, column)
    if messages is None:
        text = read_text(value, column)
        messages = read_transcript(text, column) if transcripts and prompt is None else None
        example = Example(prompt, text) if messages is None else _with_prompt(messages, None, column)
    else:
        example = _with_prompt(messages, prompt, column)
    if SYSTEM in cells:
        example = replace(example, prompt=_with_system(example.prompt, cells[SYSTEM]))
    return example, CHAT if isinstance(example.prompt, tuple) else PLAIN if messages is None else REPLY


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


def _with_system(prompt: Prompt, value: Any) -> Prompt:
    """A prompt as messages, which begin with the system prompt in a cell."""
    messages = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    if is_blank(value):
        return messages
    if read_messages(value, SYSTEM) is not None:
        raise BadRow("it contains messages; a system prompt is plain text", SYSTEM)
    system = Message("system", read_text(value, SYSTEM))
    if messages is None:
        raise BadRow("the row has no prompt that could follow it; leave it out with columns system=", SYSTEM)
    if not begins_with_system(messages):
        return (system, *messages)
    if messages[0] != system:
        raise BadRow("the messages of the row begin with another text; leave it out with columns system=", SYSTEM)
    return messages


def _check_open(messages: tuple[Message, ...], column: str) -> None:
    if messages and messages[-1].role == "assistant":
        raise BadRow("the role of the message before the reply must not be assistant", column)
