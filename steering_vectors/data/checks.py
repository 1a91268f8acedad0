"""Signs that rows do not mean what they are read as: notes for the user, and errors where there is no doubt."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from steering_vectors.data.cells import is_absent
from steering_vectors.data.chat import Example
from steering_vectors.data.records import Record

MIN_PROMPT = 8  # characters of a prompt whose repetition is no accident
MOST, FEW = 0.5, 0.05  # of the rows
MAX_NAMES = 8
SPEAKERS = (  # the beginning of a transcript, and what begins its replies
    (r"(?:###\s*)?(?:Human|User|USER)\s*:", r"\n\s*(?:###\s*)?(?:Assistant|ASSISTANT|AI|Bot)\s*:"),
    (r"(?:###\s*)?Instruction\s*:", r"\n\s*(?:###\s*)?(?:Response|Output)\s*:"),
    (r"(?:Q|Question)\s*:", r"\n\s*(?:A|Answer)\s*:"),
    (
        r"(?:<\|begin_of_text\|>)?<\|(?:user|system|prompter|im_start|start_header_id)\|>",
        r"<\|(?:assistant|im_start|start_header_id)\|>",
    ),
    (r"(?:<s>)?\s*\[INST\]", r"\[/INST\]"),
    (r"(?:<bos>)?<start_of_turn>user", r"<start_of_turn>model"),
)
TRANSCRIPTS = tuple(
    re.compile(rf"\s*(?P<first>{first}).*?(?P<second>{second})", re.DOTALL) for first, second in SPEAKERS
)
MISSING = ("nan", "NaN", "None", "null", "<NA>")
SCORES = ("score", "rating", "reward")
PROVENANCE = "provenance"  # a column of rows that trimtab writes, for people
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs", "images", "image")  # of TRL, which gives them to the template


def repeated_prompts(records: Sequence[Record]) -> int:
    """The number of rows whose texts all begin with the text of their prompt."""
    return sum(all(map(_repeats_prompt, _examples(record))) for record in records)


def notes_on(records: Sequence[Record], sides: tuple[str, str]) -> list[str]:
    """Notes on the texts of rows. `sides` names the columns of the preferred and of the other texts."""
    notes = []
    examples = [example for record in records for example in _examples(record)]
    without = sum(example.prompt is None for example in examples)
    named = " and ".join(dict.fromkeys(sides))
    if 0 < without < len(examples):
        notes.append(f"{without} of {len(examples)} texts have no prompt")
    repeated = sum(map(_repeats_prompt, examples))
    if repeated > FEW * len(examples):
        notes.append(f"{repeated} of {len(examples)} texts begin with the text of their prompt")
    found = [mark for example in examples if (mark := _transcript(example))]
    if len(found) > FEW * len(examples):
        notes.append(
            f"{len(found)} of {len(examples)} texts in {named} are transcripts, as {found[0]}, and are read as "
            "one text; write them as messages, so that the last reply alone is read"
        )
    if missing := [one.completion for one in examples if one.completion.strip() in MISSING]:
        notes.append(
            f"{len(missing)} of {len(examples)} texts are {missing[0].strip()!r}, as missing cells are printed"
        )
    return notes


def note_on_scores(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A note if a score of the preferred text is below that of the other text."""
    pairs = [
        (pattern.format("chosen"), pattern.format("rejected"))
        for score in SCORES
        for pattern in (f"{score}_{{}}", f"{{}}_{score}")
    ]
    for chosen, rejected in pairs:
        below = [row for row in rows if _number(row.get(chosen), row.get(rejected), lambda good, bad: good < bad)]
        equal = [row for row in rows if _number(row.get(chosen), row.get(rejected), lambda good, bad: good == bad)]
        for found, relation in ((below, "below"), (equal, "equal to")):
            if found:
                yield f"{chosen} is {relation} {rejected} in {len(found)} of {len(rows)} rows"


def note_on_columns(ignored: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if written := [name for name in TEMPLATE_COLUMNS if not all(is_absent(cells.get(name)) for cells in rows)]:
        yield f"prompts are read without {' and '.join(written)}, which TRL gives to the chat template"
    if others := [name for name in ignored if name != PROVENANCE]:
        more = f" and {len(others) - MAX_NAMES} more" if len(others) > MAX_NAMES else ""
        yield f"columns that were not read: {', '.join(name or repr(name) for name in others[:MAX_NAMES])}{more}"


def note_on_systems(systems: int, rows: int) -> Iterator[str]:
    if systems:
        yield (
            f"{systems} of {rows} rows have a system prompt, so all prompts are read as chat messages; "
            "leave it out with columns system="
        )


def _examples(record: Record) -> list[Example]:
    return [example for example in (record.positive, record.negative) if example is not None]


def _repeats_prompt(example: Example) -> bool:
    prompt = example.prompt[-1].content if isinstance(example.prompt, tuple) else example.prompt
    return (
        prompt is not None
        and len(prompt.strip()) >= MIN_PROMPT
        and example.completion.lstrip().startswith(prompt.strip())
    )


def _transcript(example: Example) -> str:
    """How a text that is a transcript marks its speakers; an empty text for another one."""
    for pattern in TRANSCRIPTS:
        if match := pattern.match(example.completion):
            return f"{match['first'].strip()!r} … {match['second'].strip()!r}"
    return ""


def _number(one: Any, two: Any, holds: Callable[[float, float], bool]) -> bool:
    try:
        return holds(float(one), float(two))
    except (TypeError, ValueError):
        return False
