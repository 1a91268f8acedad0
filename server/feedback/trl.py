"""Feedback in TRL's formats and in its own: rows for `trimtab fit`, and back.

A pair is a preference row, and so is an edit, whose corrected text is better than the original. A thumb is an unpaired
row, and so is a rating, by the half of its scale that it lies in. Prompts that are messages get answers that are
messages.
"""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

from server.feedback.items import KINDS, Answer, Kind, PromptValue, Stored, digest_of, user_id
from steering_vectors.errors import DataError

Rows = Literal["preference", "unpaired"]
Row = dict[str, Any]

OF_ROWS: Mapping[Rows, tuple[Kind, ...]] = {"preference": ("pair", "edit"), "unpaired": ("thumb", "rating")}


@dataclass(slots=True)
class Exported:
    """How many rows were written, and how much feedback has no row, by reason."""

    rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


def raw_rows(stored: Iterable[Stored], counts: Exported) -> Iterator[Row]:
    """Everything about each piece of feedback, as `import` reads it."""
    for one in stored:
        counts.rows += 1
        yield {name: value for name, value in asdict(one).items() if name != "seq"}


def trl_rows(stored: Iterable[Stored], rows: Rows, counts: Exported) -> Iterator[Row]:
    """TRL's rows of one format. What has none is counted."""
    for one in stored:
        row = _row(one, rows, counts)
        if row is not None:
            counts.rows += 1
            yield row


def _row(one: Stored, rows: Rows, counts: Exported) -> Row | None:
    if one.kind not in OF_ROWS[rows]:
        counts.left_out[f"{one.kind}: no {rows} row"] += 1
        return None
    first = one.answers[0]
    prompt = first["prompt"]
    if isinstance(prompt, list) and any(isinstance(turn, int) for turn in prompt):
        counts.left_out["the prompt is token ids"] += 1
        return None
    texts = _texts(one)
    if texts is None:
        counts.left_out["a tie" if one.kind == "pair" else "the middle of the scale"] += 1
        return None
    row: Row = {"prompt": prompt}
    if rows == "preference":
        chosen, rejected = texts
        return {**row, "chosen": _as_prompt(chosen, prompt), "rejected": _as_prompt(rejected, prompt)}
    return {**row, "completion": _as_prompt(texts[0], prompt), "label": texts[1] == "good"}


def _texts(one: Stored) -> tuple[str, str] | None:
    """Of a preference the better text and the worse one; else the text, and good or bad. None without a preference."""
    text = one.answers[0]["text"]
    if one.kind == "pair":
        better = one.value["better"]
        if better == "tie":
            return None
        other = one.answers[1]["text"]
        return (text, other) if better == "a" else (other, text)
    if one.kind == "edit":
        return one.value["corrected"], text
    if one.kind == "thumb":
        return text, "good" if one.value["thumb"] == "up" else "bad"
    middle = (one.value["min"] + one.value["max"]) / 2
    if one.value["rating"] == middle:
        return None
    return text, "good" if one.value["rating"] > middle else "bad"


def _as_prompt(text: str, prompt: PromptValue) -> Any:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def read_rows(lines: Iterable[str], path: str, now: float) -> Iterator[Stored]:
    """Feedback from the lines of a file, in its own format or one of TRL's. Raises DataError that names the line."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            yield _stored(row, now)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            expected = "a row of `trimtab feedback export`, or one of TRL's with a prompt"
            raise DataError(f"it is not {expected} ({type(error).__name__})", path=path, line=number) from error


def _stored(row: Row, now: float) -> Stored:
    if "kind" in row:
        return _own(row)
    digest = digest_of(json.dumps(row, sort_keys=True))
    made = f"fb-{digest[:24]}"
    if "label" in row:
        if type(row["label"]) is not bool:
            raise ValueError("label")
        thumb = "up" if row["label"] else "down"
        found = (_answer(row, "completion"),)
        return _given(made, now, "thumb", {"thumb": thumb}, digest, found)
    pair = (_answer(row, "chosen"), _answer(row, "rejected"))
    if pair[0]["text"] == pair[1]["text"]:
        raise ValueError("equal sides")
    return _given(made, now, "pair", {"better": "a"}, digest, pair)


def _given(
    made: str, now: float, kind: Kind, value: Mapping[str, Any], digest: str, answers: tuple[Answer, ...]
) -> Stored:
    return Stored(0, made, now, "", "import", None, kind, value, None, digest, answers, [None] * len(answers))


def _answer(row: Row, column: str) -> Answer:
    prompt, text = row["prompt"], row[column]
    if isinstance(text, list):
        text = text[-1]["content"]
    if not isinstance(text, str) or not isinstance(prompt, (str, list)):
        raise TypeError(column)
    return {"prompt": cast(PromptValue, prompt), "text": text}


def _own(row: Row) -> Stored:
    if row["kind"] not in KINDS:
        raise ValueError("kind")
    answers = tuple(cast(Answer, answer) for answer in row["answers"])
    whole = all(isinstance(answer["text"], str) and "prompt" in answer for answer in answers)
    if not answers or not whole or len(answers) != len(row["users"]):
        raise TypeError("answers")
    return Stored(
        0,
        str(row.get("id") or f"fb-{secrets.token_hex(12)}"),
        float(row["created"]),
        str(row["tenant"]),
        str(row["key"]),
        user_id(row["user"]),
        row["kind"],
        dict(row["value"]),
        row["idempotency_key"],
        str(row["digest"]),
        answers,
        [user_id(user) for user in row["users"]],
    )
