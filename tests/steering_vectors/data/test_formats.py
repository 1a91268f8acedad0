"""Rows as other projects write them: what is read, and what is refused with a remedy."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steering_vectors.data.chat import Example, Message
from steering_vectors.data.sources import load_pairs, parse_columns
from steering_vectors.errors import DataError
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

CHAT: Rows = [{"chosen": turns(f"q {i}", f"yes {i}"), "rejected": turns(f"q {i}", "no")} for i in range(16)]
PROMPTED: Rows = [
    {
        "prompt": turns(f"q {i}"),
        "chosen": [{"role": "assistant", "content": f"yes {i}"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    for i in range(16)
]
WANTED = tuple((Example(messages(f"q {i}"), f"yes {i}"), Example(messages(f"q {i}"), "no")) for i in range(16))


def with_fields(rows: Rows, **fields: Any) -> Rows:
    """The rows with more fields in every message."""
    return [{name: [one | fields for one in cell] for name, cell in row.items()} for row in rows]


# Fields that say nothing


@pytest.mark.parametrize(
    "fields",
    [{"tool_calls": []}, {"name": ""}, {"weight": None}, {"metadata": {}}, {"weight": float("nan")}],
    ids=str,
)
def test_empty_fields_of_messages_say_nothing(write: Write, fields: dict[str, Any]) -> None:
    assert load_pairs(write(with_fields(CHAT, **fields))).pairs() == list(WANTED)


@pytest.mark.parametrize("fields", [{"tool_calls": [{"id": "1"}]}, {"name": "Ann"}, {"weight": 0}, {"train": False}])
def test_other_fields_of_messages_are_refused(write: Write, fields: dict[str, Any]) -> None:
    path = write(with_fields(CHAT, **fields))
    problem = f"a message has role and content only, not {next(iter(fields))!r}"
    assert error_of(path) == f"{path}, line 1, field 'chosen[0]': {problem}; {REMEDY}"


@pytest.mark.parametrize("prompt", [None, ..., float("nan"), []], ids=str)
def test_some_rows_may_have_no_prompt(write: Write, prompt: Any) -> None:
    preferences = load_pairs(write(changed(PREFERENCE, 4, prompt=prompt)))
    assert preferences.pairs()[4] == (Example(None, "good 4"), Example(None, "bad 4"))
    assert preferences.pairs()[5] == (Example("q 5", "good 5"), Example("q 5", "bad 5"))
    assert preferences.notes == ("2 of 32 texts have no prompt",)


@pytest.mark.parametrize("prompt", [None, "", []], ids=str)
@pytest.mark.parametrize("rows", [PREFERENCE, UNPAIRED, CONTRAST], ids=["preference", "unpaired", "contrast"])
def test_a_column_of_empty_prompts_says_nothing(write: Write, rows: Rows, prompt: Any) -> None:
    plain = load_pairs(write([{key: value for key, value in row.items() if key != "prompt"} for row in rows]))
    assert load_pairs(write([row | {"prompt": prompt} for row in rows])).items() == plain.items()


def test_chat_and_plain_text_are_not_mixed(write: Write) -> None:
    path = write(changed(PROMPTED, 4, prompt=None))
    problem = "it contains a message without a prompt, but most rows contain chat messages"
    assert error_of(path) == f"{path}, line 5, field 'chosen': {problem}; {REMEDY}"


def test_the_form_of_most_rows_is_kept(write: Write) -> None:
    path = write([{"chosen": "a", "rejected": "b"}, *CHAT])
    message = f"{path}, line 1, field 'chosen': it contains plain text, but most rows contain chat messages"
    assert error_of(path) == f"{message}; {REMEDY}"
    preferences = load_pairs(path, skip_bad_rows=True)
    assert (preferences.pairs(), preferences.skip_messages) == (list(WANTED), (message,))


def test_transcripts_and_messages_are_one_form(write: Write) -> None:
    text = "\n\nHuman: q 4\n\nAssistant: "
    rows = changed(CHAT, 4, chosen=f"{text}yes 4", rejected=f"{text}no")
    assert load_pairs(write(rows)).pairs() == list(WANTED)


# Content in parts


def test_text_parts_are_joined_by_newlines(write: Write) -> None:
    parts = [{"type": "text", "text": "yes"}, {"type": "text", "text": "4", "image_url": None}]
    rows = changed(CHAT, 4, chosen=[*turns("q 4"), {"role": "assistant", "content": parts}])
    assert load_pairs(write(rows)).positives[4] == Example(messages("q 4"), "yes\n4")


def test_a_cell_may_hold_text_parts(write: Write) -> None:
    rows = changed(PREFERENCE, 4, chosen=[{"type": "text", "text": "good 4"}])
    assert load_pairs(write(rows)).pairs() == load_pairs(write(PREFERENCE)).pairs()


@pytest.mark.parametrize(
    ("part", "place", "problem"),
    [
        (
            {"type": "image_url", "image_url": {"url": "x"}},
            "[1]",
            "it is a part of type 'image_url'; only parts of type 'text' can be read",
        ),
        ({"type": "text"}, "[1].text", "it must be text, not NoneType"),
        ({"type": "text", "text": "a", "image": "x.png"}, "[1]", "a part has type and text only, not 'image'"),
    ],
)
def test_other_parts_are_refused(write: Write, part: dict[str, Any], place: str, problem: str) -> None:
    content = [{"type": "text", "text": "a"}, part]
    path = write(changed(CHAT, 4, chosen=[{"role": "user", "content": content}, *turns("q", "yes")[1:]]))
    assert error_of(path) == f"{path}, line 5, field 'chosen[0].content{place}': {problem}; {REMEDY}"


# Roles and names of fields


def test_a_developer_is_the_system(write: Write) -> None:
    rows = [
        {side: [{"role": "developer", "content": "Be brief."}, *cell] for side, cell in row.items()} for row in CHAT
    ]
    assert load_pairs(write(rows)).positives[0].prompt == (Message("system", "Be brief."), Message("user", "q 0"))


def sharegpt(contents: list[dict[str, str]]) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[one["role"]], "value": one["content"]} for one in contents]


def test_sharegpt_messages_are_read(write: Write) -> None:
    rows = [{side: sharegpt(cell) for side, cell in row.items()} for row in CHAT]
    assert load_pairs(write(rows)).pairs() == list(WANTED)


def test_llama_factory_rows_are_read(write: Write) -> None:
    """The conversation in a column of its own, and one ShareGPT message for each side."""
    rows = [
        {
            "conversations": sharegpt(row["prompt"]),
            "chosen": sharegpt(row["chosen"])[0],
            "rejected": sharegpt(row["rejected"])[0],
        }
        for row in PROMPTED
    ]
    assert load_pairs(write(rows), columns={"prompt": "conversations"}).pairs() == list(WANTED)


@pytest.mark.parametrize("speaker", ["function_call", "observation", "tool", None, 3])
def test_other_speakers_are_refused(write: Write, speaker: Any) -> None:
    path = write(changed(CHAT, 4, chosen=[{"from": speaker, "value": "x"}]))
    problem = f"{speaker!r} is not a role; use system, user, assistant"
    assert error_of(path) == f"{path}, line 5, field 'chosen[0].from': {problem}; {REMEDY}"


def test_columns_of_messages_are_read(write: Write) -> None:
    """`datasets` makes an object of lists of a list of objects."""
    rows = [
        {side: {key: [one[key] for one in cell] for key in ("role", "content")} for side, cell in row.items()}
        for row in CHAT
    ]
    assert load_pairs(write(rows)).pairs() == list(WANTED)


@pytest.mark.parametrize("chosen", [{"answer": "yes", "score": 1.0}, {"text": "yes"}, 3, True])
def test_other_objects_are_no_text(write: Write, chosen: Any) -> None:
    path = write(changed(PREFERENCE, 4, chosen=chosen))
    problem = f"it must be text, not {type(chosen).__name__}"
    assert error_of(path) == f"{path}, line 5, field 'chosen': {problem}; {REMEDY}"


# Messages written as text


@pytest.mark.parametrize("name", ["data.csv", "data.tsv", "data.jsonl", "data.parquet"])
@pytest.mark.parametrize("rows", [CHAT, PROMPTED], ids=["implicit", "explicit"])
def test_messages_may_be_written_as_json(write: Write, name: str, rows: Rows) -> None:
    written = [{column: json.dumps(cell, indent=1) for column, cell in row.items()} for row in rows]
    contents: dict[str, Any] = {
        "data.csv": as_csv(written),
        "data.tsv": as_csv(written, "\t"),
        "data.jsonl": written,
    }
    content = contents[name] if name in contents else as_parquet(written)
    assert load_pairs(write(content, name)).pairs() == list(WANTED)


def test_one_message_may_be_written_as_json(write: Write) -> None:
    rows = [{key: json.dumps(cell[0]) for key, cell in row.items()} for row in PROMPTED]
    assert load_pairs(write(as_csv(rows), "data.csv")).pairs() == list(WANTED)


def test_sharegpt_messages_may_be_written_as_json(write: Write) -> None:
    rows = [{side: json.dumps(sharegpt(cell)) for side, cell in row.items()} for row in CHAT]
    assert load_pairs(write(rows)).pairs() == list(WANTED)


PYTHON = "it contains messages as Python prints them; write them as JSON, by json.dumps"


@pytest.mark.parametrize(
    "printed",
    [
        str(turns("q 4", "yes")),
        "[{'role': 'user', 'content': 'q 4'}\n {'role': 'assistant', 'content': 'yes'}]",
        "array([{'content': 'q 4', 'role': 'user'}], dtype=object)",
        "{'from': 'gpt', 'value': 'yes'}",
    ],
    ids=["list", "numpy's list", "array", "one"],
)
def test_messages_as_python_prints_them_are_refused(write: Write, printed: str) -> None:
    path = write(as_csv(changed(PREFERENCE, 4, chosen=printed)), "data.csv")
    assert error_of(path) == f"{path}, line 6, field 'chosen': {PYTHON}; {REMEDY}"


def test_messages_that_are_cut_off_are_refused(write: Write) -> None:
    path = write(changed(PREFERENCE, 4, chosen='[{"role": "user", "content": "q'))
    assert (
        f"{path}, line 5, field 'chosen': it begins like messages written as JSON, but is not valid JSON ("
        in error_of(path)
    )


def test_a_message_written_as_json_names_its_place(write: Write) -> None:
    path = write(changed(PREFERENCE, 4, chosen='[{"role": "user", "content": "q"}, {"role": "assistant"}]'))
    assert error_of(path) == f"{path}, line 5, field 'chosen[1].content': it is empty; {REMEDY}"


@pytest.mark.parametrize(
    "text",
    ["[1, 2]", "[]", "{}", '{"answer": 42}', '[{"answer": 42}]', "[INST] hi", "{role}", "['a', 'b']", '["a", "b"]'],
)
def test_other_json_is_text(write: Write, text: str) -> None:
    assert load_pairs(write(changed(PREFERENCE, 4, chosen=text))).positives[4] == Example("q 4", text)


# Labels


@pytest.mark.parametrize(
    ("yes", "no"),
    [
        (1.0, 0.0),
        ("1.0", "0.0"),
        ("yes", "no"),
        ("Good", "BAD "),
        ("chosen", "rejected"),
        ("desirable", "undesirable"),
        ("thumbs_up", "Thumbs-down"),
        ("👍", "👎"),
    ],
)
def test_labels_are_words_without_doubt(write: Write, yes: Any, no: Any) -> None:
    rows = [row | {"label": yes if row["label"] else no} for row in UNPAIRED]
    preferences = load_pairs(write(rows))
    assert (preferences.positives, preferences.negatives) == (
        load_pairs(write(UNPAIRED)).positives,
        load_pairs(write(UNPAIRED)).negatives,
    )


@pytest.mark.parametrize("label", ["positive", "toxic", -1, 5, "1_full_compliance", "neutral", ""])
def test_other_labels_are_refused(write: Write, label: Any) -> None:
    path = write(changed(UNPAIRED, 4, label=label))
    problem = f"{label!r} is not a label; use true for preferred texts and false for others, or 1 and 0"
    assert error_of(path) == f"{path}, line 5, field 'label': {problem}; {REMEDY}"


def test_numbers_of_parquet_are_labels(write: Write) -> None:
    rows = [row | {"label": float(row["label"])} for row in UNPAIRED]
    assert load_pairs(write(as_parquet(rows), "data.parquet")).items() == load_pairs(write(UNPAIRED)).items()


# Names of columns


SUGGESTED = [
    ("question,matching,not_matching", "prompt=question,chosen=matching,rejected=not_matching"),
    ("question,response_chosen,response_rejected", "prompt=question,chosen=response_chosen,rejected=response_rejected"),
    (
        "instruction,chosen_response,rejected_response",
        "prompt=instruction,chosen=chosen_response,rejected=rejected_response",
    ),
    ("prompt,chosen-response,rejected-response", "chosen=chosen-response,rejected=rejected-response"),
    ("Prompt,Chosen,Rejected", "prompt=Prompt,chosen=Chosen,rejected=Rejected"),
    ("prompt,chosen,reject", "rejected=reject"),
    ("input_text,chosenResponse,rejectedResponse", "prompt=input_text,chosen=chosenResponse,rejected=rejectedResponse"),
    ("query,good answer,bad answer", "'prompt=query,chosen=good answer,rejected=bad answer'"),
    ("instruction,pos_answer,neg_answer", "prompt=instruction,chosen=pos_answer,rejected=neg_answer"),
    (
        "question,answer_matching_behavior,answer_not_matching_behavior",
        "prompt=question,chosen=answer_matching_behavior,rejected=answer_not_matching_behavior",
    ),
    ("sentence,label", "completion=sentence"),
    ("instruction,output,kto_tag", "prompt=instruction,completion=output,label=kto_tag"),
]


@pytest.mark.parametrize(("names", "suggested"), SUGGESTED)
def test_the_renaming_to_type_is_in_the_error(write: Write, names: str, suggested: str) -> None:
    values = ("A question", "one", "another") if len(names.split(",")) == 3 else ("A sentence",)
    row = dict(zip(names.split(","), values, strict=False))
    labels = {"label", "kto_tag"} & {*names.split(",")}
    rows = [{key: f"{value} {i}" for key, value in row.items()} for i in range(16)]
    path = write([cells | dict.fromkeys(labels, i % 2) for i, cells in enumerate(rows)])
    remedies = (f"rename them: columns {suggested}", f"if the column has another name, write columns {suggested}")
    assert error_of(path).endswith(remedies)
    assert load_pairs(path, columns=parse_columns(suggested.strip("'"))).rows == 16


def test_the_renaming_to_type_keeps_what_was_typed(write: Write) -> None:
    path = write([{"q": f"q {i}", "good": "a", "reject": "b"} for i in range(16)])
    for typed in ("prompt=q", "prompt=q,chosen=good"):
        assert error_of(path, columns=parse_columns(typed)).endswith("columns prompt=q,chosen=good,rejected=reject")


def test_scores_are_no_texts(write: Write) -> None:
    one = {"question": "q", "chosen_response": "a", "chosen_rating": "5"}
    rows = [one | {"rejected_response": "b", "rejected_rating": "1"}] * 16
    assert error_of(write(rows)).endswith(
        "rename them: columns prompt=question,chosen=chosen_response,rejected=rejected_response"
    )


@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        (
            {"instruction": "q", "output_1": "a", "output_2": "b", "preference": 2},
            "output_1 and output_2 do not say which text is preferred: write the preferred text of each row to chosen, "
            "and the other to rejected",
        ),
        (
            {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "score": 1},
            "human_ref_A and human_ref_B do not say which text is preferred: write the preferred text of each row to "
            "chosen, and the other to rejected",
        ),
        (
            {"text": ["a", "b"], "score": [1.0, 0.0]},
            "text is a list of texts: write the preferred one to chosen, and another to rejected",
        ),
    ],
)
def test_texts_without_an_order_are_refused(write: Write, row: dict[str, Any], remedy: str) -> None:
    assert error_of(write([row] * 16)).endswith(f"or {{positive, negative}}; {remedy}")


@pytest.mark.parametrize(
    ("rows", "typed", "missing"),
    [
        ([{"text": "x"}] * 16, "chosen=good,rejected=bad", "bad"),
        (PREFERENCE, "prompt=question", "question"),
        (PREFERENCE, "system=persona", "persona"),
        (PREFERENCE, "chosen=good", "good"),
        (PREFERENCE, "prompt=Prompt", "Prompt"),
        (PREFERENCE, "prompt=prompt,chosen", "prompt,chosen"),
        (UNPAIRED, "label=tag", "tag"),
        (CONTRAST, "prompt=question", "question"),
        (CONTRAST, "prompt=prompt", "prompt"),
    ],
)
def test_a_renaming_of_a_missing_column_is_named(write: Write, rows: Rows, typed: str, missing: str) -> None:
    path = write(rows)
    assert error_of(path, columns=parse_columns(typed)) == (
        f"{path}, line 1: there is no column {missing!r}, which columns names; the columns are {', '.join(rows[0])}"
    )


def test_a_renamed_column_may_be_missing_in_some_rows(write: Write) -> None:
    """A prompt that is missing is none, and counted; a text that is missing is an error."""
    rows = [{"question" if key == "prompt" else key: value for key, value in row.items()} for row in PREFERENCE]
    preferences = load_pairs(write(changed(rows, 0, question=...)), columns={"prompt": "question"})
    assert [one.prompt for one in preferences.positives[:2]] == [None, "q 1"]
    assert preferences.notes == ("2 of 32 texts have no prompt",)
    path = write(changed([row | {"good": "x"} for row in rows], 0, good=...))
    assert error_of(path, columns={"chosen": "good", "prompt": "question"}) == (
        f"{path}, line 1, field 'good': it is missing; if the column has another name, name it in columns; {REMEDY}"
    )


def test_a_column_that_a_renaming_replaces_is_noted(write: Write) -> None:
    preferences = load_pairs(write([row | {"question": "Why?"} for row in PREFERENCE]), columns={"prompt": "question"})
    assert {one.prompt for one in preferences.positives} == {"Why?"}
    assert preferences.notes == ("columns that were not read: prompt",)


@pytest.mark.parametrize("name", ["is it", "a,b", "größe", "a=b", "it's", 'a "b"', "问题", "1,2,3"])
def test_columns_may_have_any_name(write: Write, name: str) -> None:
    """Also as the error suggests them, in a shell."""
    rows = [{"prompt": row["prompt"], f"{name} chosen": row["chosen"], "reject": row["rejected"]} for row in PREFERENCE]
    path = write(rows)
    (typed,) = shlex.split(error_of(path).rpartition("columns ")[2])
    assert load_pairs(path, columns=parse_columns(typed)).pairs() == load_pairs(write(PREFERENCE)).pairs()


@pytest.mark.parametrize(
    ("rows", "other", "remedy"),
    [
        (PREFERENCE, "question", "read it with columns prompt=question, or leave it out with columns prompt="),
        (PREFERENCE, "Prompt", "read it with columns prompt=Prompt, or leave it out with columns prompt="),
        (UNPAIRED, "query", "read it with columns prompt=query, or leave it out with columns prompt="),
        (
            [{"prompt": "q", **row} for row in CONTRAST],
            "question",
            "read it with columns prompt=question,chosen=positive,rejected=negative, or leave it out with columns "
            "prompt=",
        ),
    ],
)
def test_a_prompt_under_another_name_is_not_dropped(write: Write, rows: Rows, other: str, remedy: str) -> None:
    path = write([{other if key == "prompt" else key: value for key, value in row.items()} for row in rows])
    assert error_of(path) == f"{path}: no row has a prompt, but the column {other!r} looks like one; {remedy}"
    read, left_out = (part.rpartition("columns ")[2] for part in remedy.split(", or "))
    assert load_pairs(path, columns=parse_columns(read)).positives[0].prompt == rows[0]["prompt"]
    text = next(name for name in rows[0] if name != "prompt")
    for kept in (left_out, f"{text}={text}"):
        preferences = load_pairs(path, columns=parse_columns(kept))
        assert preferences.positives[0].prompt is None
        assert preferences.notes == (f"columns that were not read: {other}",)


@pytest.mark.parametrize(
    ("rows", "typed", "read"),
    [
        (PREFERENCE, "chosen=good", "prompt=question,chosen=good"),
        (UNPAIRED, "completion=good", "prompt=question,completion=good"),
        (CONTRAST, "positive=good", "prompt=question,chosen=good,rejected=negative"),
    ],
    ids=["preference", "unpaired", "contrast"],
)
def test_renamed_texts_do_not_drop_a_prompt(write: Write, rows: Rows, typed: str, read: str) -> None:
    text = typed.partition("=")[0]
    path = write([row | {"question": f"q {i}", "good": row[text], "prompt": ""} for i, row in enumerate(rows)])
    assert error_of(path, columns=parse_columns(typed)) == (
        f"{path}: no row has a prompt, but the column 'question' looks like one; read it with columns {read}, "
        f"or leave it out with columns prompt=,{typed}"
    )
    assert load_pairs(path, columns=parse_columns(read)).positives[0].prompt == "q 0"
    assert load_pairs(path, columns=parse_columns(f"prompt=,{typed}")).positives[0].prompt is None


def test_an_instruction_with_its_input_is_one_prompt(write: Write) -> None:
    rows: Rows = [{"instruction": "Add.", "input": "", "chosen": f"a {i}", "rejected": "b"} for i in range(16)]
    assert "read it with columns prompt=instruction, or " in error_of(write(rows))
    path = write(changed(rows, 4, input="1 and 2"))
    assert error_of(path) == (
        f"{path}: no row has a prompt, but the column 'instruction' looks like one; "
        "write instruction and input to one column prompt, or leave it out with columns prompt="
    )


def test_chat_messages_hold_their_prompt(write: Write) -> None:
    rows = [row | {"messages": turns("q"), "question": "q"} for row in CHAT]
    assert load_pairs(write(rows)).pairs() == list(WANTED)


# Anything else

KEYS = st.sampled_from(["role", "content", "from", "value", "type", "text", "name", "x"])
WORDS = st.sampled_from(["user", "assistant", "system", "human", "gpt", "text", "", " ", "nan", "[{", "{'role': 1}"])
CELLS = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | WORDS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


WITH_SYSTEM: Rows = [{"system": "Be brief.", **row} for row in PREFERENCE]
NAMES = st.sampled_from(["system", "prompt", "chosen", "completion", "label", "positive"])


@given(cell=CELLS, written=st.booleans(), column=NAMES)
def test_any_cell_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, cell: Any, written: bool, column: str
) -> None:
    rows = next(rows for rows in (PREFERENCE, UNPAIRED, CONTRAST, WITH_SYSTEM) if column in rows[0])
    path = tmp_path_factory.mktemp("any") / "data.jsonl"
    value = json.dumps(cell) if written else cell
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, changed(rows, 4, **{column: value})[4]]))
    kept = load_pairs(path, skip_bad_rows=True)
    assert (kept.rows, kept.skipped) in ((17, 0), (16, 1))
    if not kept.skipped:
        assert load_pairs(path).items() == kept.items()
        return
    with pytest.raises(DataError) as caught:
        load_pairs(path)
    assert (caught.value.line, str(caught.value.field).partition("[")[0]) in {(17, key) for key in rows[0]}
