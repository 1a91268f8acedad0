"""The brief of a profile: pairs of instructions and questions, from templates, from a model, or from edited files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from steering_vectors.data.chat import Message
from steering_vectors.errors import DataError, FitError
from steering_vectors.synthesis.folder import Folder
from steering_vectors.synthesis.templates import Trait
from steering_vectors.synthesis.writers import Ask, Length, Writer
from steering_vectors.tuning.instructions import Instructions

INSTRUCTIONS, QUESTIONS = "instructions.jsonl", "questions.jsonl"
MIN_QUESTIONS = 8
HELD_OUT_EVERY = 4  # one question in so many is kept for the evaluation
ATTEMPTS = 4
BATCH = 10  # rows that a model is asked for at once
WRITING = Length(tokens=1024, temperature=0.7)
LONGEST = 400  # characters of an instruction or a question
SPACES = re.compile(r"[\s,]*")

Item = TypeVar("Item")

ASK_INSTRUCTIONS = """An assistant's answers can be described like this: {trait}.{opposite}

Write {count} pairs of instructions for the assistant, as different from each other as possible. In each pair, \
"positive" makes the assistant answer like this as clearly as possible, and "negative" makes it answer in the opposite \
way. Each instruction is one or two sentences and addresses the assistant.

Reply with a JSON list only: [{{"positive": "...", "negative": "..."}}]"""
ASK_QUESTIONS = """An assistant's answers can be described like this: {trait}.{opposite}

Write {count} questions that people may ask the assistant, whose answers would show whether this is so. Do not mention \
the description in the questions. Take different topics and different lengths.

Reply with a JSON list of texts only: ["...", "..."]"""


@dataclass(frozen=True, slots=True)
class Question:
    text: str
    held_out: bool = False


@dataclass(frozen=True, slots=True)
class Brief:
    instructions: tuple[Instructions, ...]
    questions: tuple[Question, ...]


def brief_in(
    folder: Folder, trait: Trait, *, instructions: int, questions: int, writer: Writer | None, seed: int = 0
) -> Brief:
    """The brief in a folder. A file that is not there is written first: by the writer, or from templates.

    Raises DataError for a file that cannot be used, FitError if the writer writes nothing that can be.
    """
    if not folder.file(INSTRUCTIONS).is_file():
        pairs = trait.instructions(instructions)
        if writer is not None:
            pairs = _written_instructions(writer, trait, instructions, folder, seed)
        folder.write(INSTRUCTIONS, ({"positive": one.positive, "negative": one.negative} for one in pairs))
    if not folder.file(QUESTIONS).is_file():
        texts = trait.questions(questions)
        if writer is not None:
            texts = _written_questions(writer, trait, questions, folder, seed)
        rows = ({"question": text, "held_out": place % HELD_OUT_EVERY == 3} for place, text in enumerate(texts))
        folder.write(QUESTIONS, rows)
    return _read(folder)


def _read(folder: Folder) -> Brief:
    path = str(folder.file(INSTRUCTIONS))
    found = []
    for row in folder.rows(INSTRUCTIONS, ("positive", "negative")):
        try:
            found.append(Instructions(row["positive"], row["negative"]))
        except FitError as error:
            raise DataError(error.message, path=path) from error
    if not found:
        raise DataError("it holds no pair of instructions: write one, or delete the file", path=path)
    questions = {
        row["question"]: Question(row["question"], bool(row.get("held_out")))
        for row in folder.rows(QUESTIONS, ("question",))
    }
    path = str(folder.file(QUESTIONS))
    if sum(not one.held_out for one in questions.values()) < MIN_QUESTIONS:
        raise DataError(f"at least {MIN_QUESTIONS} different questions that are not held out are needed", path=path)
    return Brief(tuple(found), tuple(questions.values()))


def _written_instructions(writer: Writer, trait: Trait, count: int, folder: Folder, seed: int) -> list[Instructions]:
    sides = {side: {"type": "string", "maxLength": LONGEST} for side in ("positive", "negative")}
    item = {"type": "object", "properties": sides, "required": list(sides), "additionalProperties": False}

    def read(value: Any) -> Instructions | None:
        if not isinstance(value, dict):
            return None
        texts = [value.get(side) for side in ("positive", "negative")]
        if (
            not all(isinstance(text, str) and 0 < len(text.strip()) <= LONGEST for text in texts)
            or texts[0] == texts[1]
        ):
            return None
        return Instructions(*(str(text).strip() for text in texts))

    found = _written(writer, trait, ASK_INSTRUCTIONS, item, read, count, seed)
    if not found:
        raise _nothing(writer, folder, INSTRUCTIONS, '{"positive": "…", "negative": "…"}')
    return found


def _written_questions(writer: Writer, trait: Trait, count: int, folder: Folder, seed: int) -> list[str]:
    item = {"type": "string", "maxLength": LONGEST}

    def read(value: Any) -> str | None:
        return value.strip() if isinstance(value, str) and 0 < len(value.strip()) <= LONGEST else None

    found = _written(writer, trait, ASK_QUESTIONS, item, read, count, seed)
    if len(found) < min(count, 2 * MIN_QUESTIONS):
        raise _nothing(writer, folder, QUESTIONS, '{"question": "…"}')
    return found


def _written(
    writer: Writer,
    trait: Trait,
    request: str,
    item: dict[str, Any],
    read: Callable[[Any], Item | None],
    count: int,
    seed: int,
) -> list[Item]:
    """At most `count` different items that the writer's replies hold, in a few attempts."""
    found: dict[Item, None] = {}
    opposite = f" The opposite is: {trait.opposite}." if trait.opposite else ""
    for attempt in range(ATTEMPTS + count // BATCH):
        wanted = min(BATCH, count - len(found))
        if wanted <= 0:
            break
        text = request.format(trait=trait.clean, opposite=opposite, count=wanted)
        schema = {"type": "array", "items": item, "minItems": wanted, "maxItems": wanted}
        ask = Ask((Message("user", text),), seed=seed + attempt, schema=schema)
        for reply in writer.write([ask], WRITING):
            usable = (one for one in map(read, json_list(reply.text)) if one is not None)
            found |= dict.fromkeys(usable)
    return list(found)[:count]


def json_list(text: str) -> Sequence[Any]:
    """The first JSON list in a text, also one that the limit of tokens cut off; an empty one if there is none."""
    decoder = json.JSONDecoder()
    start = text.find("[")
    if start < 0:
        return ()
    try:
        found, _ = decoder.raw_decode(text, start)
    except ValueError:
        found, place = [], start + 1
        while match := SPACES.match(text, place):
            try:
                value, place = decoder.raw_decode(text, match.end())
            except ValueError:
                break
            found.append(value)
    return found if isinstance(found, list) else ()


def _nothing(writer: Writer, folder: Folder, name: str, row: str) -> FitError:
    return FitError(
        f"{writer.name} wrote too little that can be used for {name}: make it from templates with --writer templates, "
        f"name an endpoint with a larger model, or write {folder.file(name)} yourself, one {row} a line"
    )
