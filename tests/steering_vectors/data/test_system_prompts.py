"""The column of system prompts: what becomes of a row's prompt, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from steering_vectors.data.chat import Example, Message
from steering_vectors.data.corpus import encode_corpus
from steering_vectors.data.sources import load_pairs, parse_columns
from tests.support.preference_rows import (
    CONTRAST,
    PREFERENCE,
    REMEDY,
    UNPAIRED,
    Rows,
    Write,
    as_csv,
    as_parquet,
    changed,
    error_of,
    messages,
    turns,
)
from tests.support.tiny import tiny_tokenizer

BRIEF = Message("system", "Be brief.")
SYSTEM = {"role": "system", "content": "Be brief."}
CHAT: Rows = [{"chosen": turns(f"q {i}", f"good {i}"), "rejected": turns(f"q {i}", f"bad {i}")} for i in range(16)]
READ = [
    (Example((BRIEF, *messages(f"q {i}")), f"good {i}"), Example((BRIEF, *messages(f"q {i}")), f"bad {i}"))
    for i in range(16)
]
LEAVE = "leave it out with columns system="


def briefly(rows: Rows) -> Rows:
    return [row | {"system": "Be brief."} for row in rows]


def note(count: int, rows: int = 16) -> str:
    return f"{count} of {rows} rows have a system prompt, so all prompts are read as chat messages; {LEAVE}"


PROMPTS: dict[str, Rows] = {
    "plain": PREFERENCE,
    "messages": [row | {"prompt": turns(row["prompt"])} for row in PREFERENCE],
    "implicit": CHAT,
    "both": [row | {"prompt": f"q {i}"} for i, row in enumerate(CHAT)],
    "transcripts": [
        {side: f"\n\nHuman: q {i}\n\nAssistant: {word} {i}" for side, word in (("chosen", "good"), ("rejected", "bad"))}
        for i in range(16)
    ],
    "prompt with the same text": [row | {"prompt": [SYSTEM, *turns(row["prompt"])]} for row in PREFERENCE],
    "texts with the same text": [{side: [SYSTEM, *cell] for side, cell in row.items()} for row in CHAT],
    "one text with the same text": [row | {"chosen": [SYSTEM, *row["chosen"]]} for row in CHAT],
}


@pytest.mark.parametrize("rows", PROMPTS.values(), ids=PROMPTS.keys())
def test_a_system_prompt_is_the_first_message(write: Write, rows: Rows) -> None:
    preferences = load_pairs(write(briefly(rows)))
    assert preferences.pairs() == READ
    assert (preferences.ignored_columns, preferences.notes) == ((), (note(16),))


def test_unpaired_rows_have_system_prompts(write: Write) -> None:
    preferences = load_pairs(write(briefly(UNPAIRED)))
    assert preferences.positives[1] == Example((BRIEF, *messages("q 2")), "text 2")
    assert preferences.negatives[1] == Example((BRIEF, *messages("q 3")), "text 3")


def test_contrasting_conversations_have_system_prompts(write: Write) -> None:
    rows = [{"positive": turns(f"be kind {i}", "ok"), "negative": turns(f"be rude {i}", "ok")} for i in range(16)]
    assert load_pairs(write(briefly(rows))).pairs()[0] == (
        Example((BRIEF, *messages("be kind 0")), "ok"),
        Example((BRIEF, *messages("be rude 0")), "ok"),
    )


@pytest.mark.parametrize("file", ["data.csv", "data.parquet"])
def test_the_column_may_have_another_name(write: Write, file: str) -> None:
    rows = [row | {"system": "ignored", "persona": "Be brief."} for row in PREFERENCE]
    path = write(as_csv(rows) if file == "data.csv" else as_parquet(rows), file)
    preferences = load_pairs(path, columns={"system": "persona"})
    assert preferences.pairs() == READ
    assert preferences.notes == ("columns that were not read: system", note(16))


@pytest.mark.parametrize("system", [None, "", " \n", float("nan"), ...], ids=str)
def test_an_empty_cell_says_nothing(write: Write, system: Any) -> None:
    """The plain prompts of such rows are user messages, as those of the others are."""
    preferences = load_pairs(write(changed(briefly(PREFERENCE), 4, system=system)))
    assert preferences.pairs()[3:5] == [
        READ[3],
        (Example(messages("q 4"), "good 4"), Example(messages("q 4"), "bad 4")),
    ]
    assert preferences.notes == (note(15),)


@pytest.mark.parametrize("system", [None, "", " \n", float("nan")], ids=str)
def test_an_empty_column_says_nothing(write: Write, system: Any) -> None:
    preferences = load_pairs(write([row | {"system": system} for row in PREFERENCE]))
    assert (preferences.pairs(), preferences.notes) == (load_pairs(write(PREFERENCE)).pairs(), ())


@pytest.mark.parametrize("columns", [{"system": ""}, parse_columns("system=")])
def test_system_prompts_can_be_left_out(write: Write, columns: dict[str, str]) -> None:
    preferences = load_pairs(write(briefly(PREFERENCE)), columns=columns)
    assert preferences.pairs() == load_pairs(write(PREFERENCE)).pairs()
    assert preferences.notes == ("columns that were not read: system",)


NO_PROMPT = f"the row has no prompt that could follow it; {LEAVE}"
OTHER_TEXT = f"the messages of the row begin with another text; {LEAVE}"


@pytest.mark.parametrize(
    ("rows", "cells", "problem"),
    [
        (PREFERENCE, {"prompt": None}, NO_PROMPT),
        (CONTRAST, {}, NO_PROMPT),
        (PREFERENCE, {"prompt": [{"role": "system", "content": "Be long."}, *turns("q")]}, OTHER_TEXT),
        (CHAT, {side: [{**SYSTEM, "content": "Be brief. "}, *turns("q", side)] for side in CHAT[0]}, OTHER_TEXT),
        (PREFERENCE, {"system": 3}, "it must be text, not int"),
        (PREFERENCE, {"system": [SYSTEM]}, "it contains messages; a system prompt is plain text"),
        (
            PREFERENCE,
            {"system": '{"role": "system", "content": "x"}'},
            "it contains messages; a system prompt is plain text",
        ),
    ],
)
def test_a_system_prompt_that_cannot_be_used_is_refused(
    write: Write, rows: Rows, cells: dict[str, Any], problem: str
) -> None:
    bad = 0 if rows is CONTRAST else 4
    path = write(changed(briefly(rows), bad, **cells))
    assert error_of(path) == f"{path}, line {bad + 1}, field 'system': {problem}; {REMEDY}"


def test_sides_with_different_system_messages_differ(write: Write) -> None:
    rows = changed(CHAT, 4, chosen=[SYSTEM, *CHAT[4]["chosen"]])
    problem = "the transcripts of chosen and rejected differ before the last reply"
    path = write(rows)
    assert error_of(path) == f"{path}, line 5, field 'rejected': {problem}; {REMEDY}"


SAMPLE = "no row has a system prompt, but the column {0!r} looks like one; read it with columns {1}"


@pytest.mark.parametrize("name", ["system_prompt", "System", "systemMessage"])
def test_a_system_prompt_under_another_name_is_not_dropped(write: Write, name: str) -> None:
    path = write([row | {name: "Be brief."} for row in PREFERENCE])
    wanted = f"system={name}"
    assert error_of(path) == f"{path}: {SAMPLE.format(name, wanted)}, or {LEAVE}"
    assert load_pairs(path, columns=parse_columns(wanted)).pairs() == READ
    assert load_pairs(path, columns=parse_columns("system=")).notes == (f"columns that were not read: {name}",)


def test_the_remedy_keeps_what_was_typed(write: Write) -> None:
    path = write([{"q": row["prompt"], **row, "system_prompt": "Be brief."} for row in PREFERENCE])
    wanted = "system=system_prompt,prompt=q"
    assert (
        error_of(path, columns={"prompt": "q"})
        == f"{path}: {SAMPLE.format('system_prompt', wanted)}, or {LEAVE},prompt=q"
    )
    assert load_pairs(path, columns=parse_columns(wanted)).pairs() == READ


@pytest.mark.parametrize(
    "rows", [CONTRAST, [{side: [SYSTEM, *cell] for side, cell in row.items()} for row in CHAT]], ids=["none", "system"]
)
def test_rows_without_a_use_for_it_may_have_such_a_column(write: Write, rows: Rows) -> None:
    path = write([row | {"system_prompt": "Be brief."} for row in rows])
    assert load_pairs(path).notes == ("columns that were not read: system_prompt",)


def test_a_missing_prompt_is_named_before_the_system_prompt(write: Write) -> None:
    """As in Orca's DPO pairs."""
    path = write([{"question": row.pop("prompt"), **row} for row in map(dict, briefly(PREFERENCE))])
    assert error_of(path) == (
        f"{path}: no row has a prompt, but the column 'question' looks like one; read it with columns prompt=question, "
        "or leave it out with columns prompt="
    )
    assert load_pairs(path, columns={"prompt": "question"}).pairs() == READ


@pytest.mark.parametrize("template", [True, False], ids=["template", "none"])
def test_a_column_and_messages_encode_alike(write: Write, template: bool) -> None:
    """With a chat template, and with the fallback, which joins the texts by newlines."""
    tokenizer = tiny_tokenizer(chat_template=template)
    written = load_pairs(write(PROMPTS["texts with the same text"], "written.jsonl"))
    corpus = encode_corpus(tokenizer, load_pairs(write(briefly(PREFERENCE))), limit=None)
    assert corpus.encoded == encode_corpus(tokenizer, written, limit=None).encoded
    ids, start = corpus.encoded[READ[3][0]]
    before = (
        tokenizer.apply_chat_template([SYSTEM, *turns("q 3")], tokenize=False, add_generation_prompt=True)
        if template
        else "Be brief.\nq 3"
    )
    assert tokenizer.decode(ids[:start]) == tokenizer.decode(
        tokenizer(before, add_special_tokens=not template)["input_ids"]
    )
