"""Cells of preference data: texts, labels, and chat messages in the forms in which data sets store them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, cast

from steering_vectors.data.chat import ROLES, Message, Role
from steering_vectors.data.tables import BadRow

LABELS = {
    True: ("true", "1", "1.0", "yes", "good", "chosen", "desirable", "thumbs up", "👍"),
    False: ("false", "0", "0.0", "no", "bad", "rejected", "undesirable", "thumbs down", "👎"),
}
SHAREGPT = {"from": "role", "value": "content"}
OTHER_ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "developer": "system"}
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
WRITTEN_MESSAGES = re.compile(
    r"""\s*(?:array\(\s*)?\[?\s*\{\s*(?P<quote>["'])(?:role|content|from|value)(?P=quote)\s*:"""
)


def is_absent(value: Any) -> bool:
    """Whether a cell contains nothing: null, NaN, or an empty text, list or object."""
    return value is None or value != value or (isinstance(value, str | list | dict) and not value)


def is_blank(value: Any) -> bool:
    """Whether a cell contains nothing, or only whitespace."""
    return is_absent(value) or (isinstance(value, str) and not value.strip())


def read_text(value: Any, place: str) -> str:
    """The text in a cell; text parts are joined by newlines, as the server joins them. Raises BadRow."""
    if isinstance(value, list) and value and all(isinstance(one, dict) and "type" in one for one in value):
        value = "\n".join(_part(one, f"{place}[{index}]") for index, one in enumerate(value))
    if is_absent(value):
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


def read_messages(value: Any, column: str) -> tuple[Message, ...] | None:
    """The messages in a cell, or None if it contains something else. Raises BadRow.

    A cell holds a list of messages, one message, or an object of columns, each also written as JSON. A message has role
    and content, or ShareGPT's from and value.
    """
    found = _written(value, column) if isinstance(value, str) else value
    if isinstance(found, dict):
        found = _rows(found)
    if not isinstance(found, list) or _is_parts(found):
        return None
    if not found:
        raise BadRow("it is an empty list of messages", column)
    return tuple(_message(one, f"{column}[{index}]") for index, one in enumerate(found))


def read_transcript(text: str, column: str) -> tuple[Message, ...] | None:
    """The messages of an HH-RLHF transcript, whose turns begin with a blank line and 'Human:' or 'Assistant:'.

    None for another text. Raises BadRow.
    """
    if not HH_TURN.match(text):
        return None
    parts = HH_TURN.split(text)[1:]
    turns = []
    for number, (speaker, content) in enumerate(zip(parts[::2], parts[1::2], strict=True), start=1):
        if not content.strip():
            raise BadRow(f"turn {number} of the transcript ({HH_ROLES[speaker]}) is empty", column)
        turns.append(_message({"role": HH_ROLES[speaker], "content": content.strip()}, column))
    return tuple(turns)


def read_label(cells: Mapping[str, Any]) -> bool:
    """Read the label of a row, which is true for a preferred text. Raises BadRow."""
    value = read_cell(cells, "label")
    word = re.sub(r"[\s_-]+", " ", str(value).strip().lower())
    for label, words in LABELS.items():
        if word in words:
            return label
    raise BadRow(f"{value!r} is not a label; use true for preferred texts and false for others, or 1 and 0", "label")


def read_cell(cells: Mapping[str, Any], column: str) -> Any:
    """The cell of a column that must exist. Raises BadRow."""
    if column not in cells:
        raise BadRow("it is missing; if the column has another name, name it in columns", column)
    return cells[column]


def _written(text: str, column: str) -> Any:
    """The messages that are written in a text as JSON; None for another text."""
    if not text.lstrip().startswith(("[", "{", "array(")):
        return None
    likely = WRITTEN_MESSAGES.match(text)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        if likely is None:
            return None
        if likely["quote"] == "'":
            raise BadRow(
                "it contains messages as Python prints them; write them as JSON, by json.dumps", column
            ) from error
        raise BadRow(f"it begins like messages written as JSON, but is not valid JSON ({error})", column) from error
    objects = [found] if isinstance(found, dict) else found
    if not likely and not (objects and all(map(_is_message, objects))):
        return None
    return objects


def _is_message(one: Any) -> bool:
    return isinstance(one, dict) and ({"role", "content"} <= one.keys() or SHAREGPT.keys() <= one.keys())


def _is_parts(found: list[Any]) -> bool:
    return bool(found) and all(isinstance(one, dict) and "type" in one and "role" not in one for one in found)


def _rows(value: dict[str, Any]) -> list[Any] | None:
    """The messages of an object: itself, or the rows of its columns, which `datasets` makes of a list of objects."""
    if not _is_message(value):
        return None
    if all(isinstance(column, list) for column in value.values()) and len({len(one) for one in value.values()}) == 1:
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    return [value]


def _message(one: Any, place: str) -> Message:
    if not isinstance(one, dict):
        raise BadRow(f"a message must be an object with role and content, not {type(one).__name__}", place)
    names = {"role": "role", "content": "content"}
    if "role" not in one and SHAREGPT.keys() <= one.keys():
        names = {name: key for key, name in SHAREGPT.items()}
    if unknown := sorted(key for key, held in one.items() if key not in names.values() and not is_absent(held)):
        raise BadRow(f"a message has role and content only, not {unknown[0]!r}", place)
    role = one.get(names["role"])
    known = OTHER_ROLES.get(role, role) if isinstance(role, str) else role
    if known not in ROLES:
        raise BadRow(f"{role!r} is not a role; use {', '.join(ROLES)}", f"{place}.{names['role']}")
    return Message(cast(Role, known), read_text(one.get(names["content"]), f"{place}.{names['content']}"))


def _part(one: dict[str, Any], place: str) -> str:
    if one["type"] != "text":
        raise BadRow(f"it is a part of type {one['type']!r}; only parts of type 'text' can be read", place)
    if unknown := sorted(key for key, held in one.items() if key not in ("type", "text") and not is_absent(held)):
        raise BadRow(f"a part has type and text only, not {unknown[0]!r}", place)
    if not isinstance(text := one.get("text"), str):
        raise BadRow(f"it must be text, not {type(text).__name__}", f"{place}.text")
    return text
