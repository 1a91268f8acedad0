"""Notes on rows that look mistaken."""

from __future__ import annotations

from typing import Any

import pytest

from steering_vectors.data.sources import load_pairs
from tests.support.preference_rows import CONTRAST, PREFERENCE, UNPAIRED, Rows, Write, changed, error_of, turns

ASKED: Rows = [{"prompt": f"How do I bake {i}?", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(16)]


def repeating(rows: Rows, *sides: str, count: int = 16) -> Rows:
    """The first rows with the prompt before the texts of these sides."""
    repeated = [row | {side: f"{row['prompt']} {row[side]}" for side in sides} for row in rows[:count]]
    return [*repeated, *rows[count:]]


def test_ordinary_rows_have_no_notes(write: Write) -> None:
    for rows in (PREFERENCE, UNPAIRED, CONTRAST, ASKED):
        assert load_pairs(write(rows)).notes == ()


def test_columns_that_are_not_read_are_noted(write: Write) -> None:
    rows = [row | {"source": "web", "": 0} for row in PREFERENCE]
    assert load_pairs(write(rows)).notes == ("columns that were not read: source, ''",)
    rows = [row | {f"c{number}": 0 for number in range(11)} for row in PREFERENCE]
    assert load_pairs(write(rows)).notes == ("columns that were not read: c0, c1, c2, c3, c4, c5, c6, c7 and 3 more",)


@pytest.mark.parametrize(
    ("cells", "named"),
    [
        ({"tools": [{"type": "function"}], "images": [], "chat_template_kwargs": None}, "tools"),
        ({"chat_template_kwargs": {"enable_thinking": False}, "tools": "[]"}, "tools and chat_template_kwargs"),
        ({"image": "x.png"}, "image"),
    ],
    ids=["tools", "kwargs", "image"],
)
def test_columns_that_trl_gives_to_the_template_are_noted(write: Write, cells: dict[str, Any], named: str) -> None:
    assert load_pairs(write(changed(PREFERENCE, 4, **cells))).notes == (
        f"prompts are read without {named}, which TRL gives to the chat template",
        f"columns that were not read: {', '.join(cells)}",
    )


@pytest.mark.parametrize("count", [9, 16])
def test_texts_that_repeat_their_prompt_in_most_rows_are_refused(write: Write, count: int) -> None:
    path = write(repeating(ASKED, "chosen", "rejected", count=count))
    message = (
        f"{path}: in {count} of 16 rows the texts begin with the text of their prompt, which would be read twice; "
        "remove it from the texts, or remove the column of the prompt"
    )
    assert error_of(path) == message
    assert error_of(path, skip_bad_rows=True) == message


def test_unpaired_texts_that_repeat_their_prompt_are_refused(write: Write) -> None:
    rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2} for i, row in enumerate(ASKED)]
    assert "in 16 of 16 rows the texts begin with the text of their prompt" in error_of(
        write(repeating(rows, "completion"))
    )


def test_replies_that_repeat_the_users_message_are_refused(write: Write) -> None:
    rows = [row | {"prompt": turns(row["prompt"])} for row in repeating(ASKED, "chosen", "rejected")]
    assert "in 16 of 16 rows the texts begin with the text of their prompt" in error_of(write(rows))


@pytest.mark.parametrize(
    ("rows", "noted"),
    [
        (repeating(ASKED, "chosen", "rejected", count=8), ("16 of 32 texts begin with the text of their prompt",)),
        (repeating(ASKED, "chosen"), ("16 of 32 texts begin with the text of their prompt",)),
        (repeating(ASKED, "chosen", count=1), ()),
        (repeating([row | {"prompt": "Hi"} for row in ASKED], "chosen", "rejected"), ()),
    ],
    ids=["half of the rows", "one side", "one text", "short prompts"],
)
def test_other_repeated_prompts_are_noted(write: Write, rows: Rows, noted: tuple[str, ...]) -> None:
    assert load_pairs(write(rows)).notes == noted


@pytest.mark.parametrize(
    ("text", "first", "second"),
    [
        ("Human: Hi\n\nAssistant: {}", "Human:", "Assistant:"),
        ("User: Hi\nAssistant: {}", "User:", "Assistant:"),
        ("### Human: Hi\n### Assistant: {}", "### Human:", "### Assistant:"),
        ("### Instruction:\nHi\n\n### Response:\n{}", "### Instruction:", "### Response:"),
        ("Q: Hi?\nA: {}", "Q:", "A:"),
        ("<|user|>\nHi\n<|assistant|>\n{}", "<|user|>", "<|assistant|>"),
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{}", "<|im_start|>", "<|im_start|>"),
        ("<s>[INST] Hi [/INST] {}", "<s>[INST]", "[/INST]"),
        (
            "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n{}",
            "<start_of_turn>user",
            "<start_of_turn>model",
        ),
    ],
)
@pytest.mark.parametrize("sides", [("chosen", "rejected"), ("positive", "negative")])
def test_transcripts_as_text_are_noted(
    write: Write, text: str, first: str, second: str, sides: tuple[str, str]
) -> None:
    rows: Rows = [{sides[0]: text.format(f"good {i}"), sides[1]: text.format("bad")} for i in range(16)]
    assert load_pairs(write(rows)).notes == (
        f"32 of 32 texts in {sides[0]} and {sides[1]} are transcripts, as {first!r} … {second!r}, and are read as one "
        "text; write them as messages, so that the last reply alone is read",
    )


@pytest.mark.parametrize("text", ["User: Hi {}", "A user said: {}", "Q {}\nA: no", "I asked a Human: {}\nAssistant: x"])
def test_other_texts_are_no_transcripts(write: Write, text: str) -> None:
    rows: Rows = [{"chosen": text.format(f"good {i}"), "rejected": text.format("bad")} for i in range(16)]
    assert load_pairs(write(rows)).notes == ()


@pytest.mark.parametrize("printed", ["nan", "None", " null\n"])
def test_printed_missing_cells_are_noted(write: Write, printed: str) -> None:
    noted = f"1 of 32 texts are {printed.strip()!r}, as missing cells are printed"
    assert load_pairs(write(changed(PREFERENCE, 4, chosen=printed))).notes == (noted,)


@pytest.mark.parametrize("names", [("score_chosen", "score_rejected"), ("chosen_rating", "rejected_rating")])
def test_scores_against_the_preference_are_noted(write: Write, names: tuple[str, str]) -> None:
    def scored(*scores: tuple[Any, Any]) -> Rows:
        return [row | dict(zip(names, scores[i % len(scores)], strict=True)) for i, row in enumerate(PREFERENCE)]

    unread = f"columns that were not read: {names[0]}, {names[1]}"
    assert load_pairs(write(scored((5, 1), ("9", "8.5"), (None, 2)))).notes == (unread,)
    assert load_pairs(write(scored((5, 1), (1.5, 2), (3, 3), (4, 4)))).notes == (
        unread,
        f"{names[0]} is below {names[1]} in 4 of 16 rows",
        f"{names[0]} is equal to {names[1]} in 8 of 16 rows",
    )
