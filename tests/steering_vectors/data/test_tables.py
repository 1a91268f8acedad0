"""Files whose content is not what the name says, and tables as other programs write them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from steering_vectors.data.sources import load_pairs
from tests.support.preference_rows import (
    CONTRAST,
    PREFERENCE,
    REMEDY,
    Write,
    as_csv,
    as_parquet,
    changed,
    error_of,
    turns,
)

WANTED = [(row["prompt"], row["chosen"], row["rejected"]) for row in PREFERENCE]


def read(path: str) -> list[tuple[Any, str, str]]:
    return [(good.prompt, good.completion, bad.completion) for good, bad in load_pairs(path).pairs()]


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


# Content against the name


def test_gzip_is_recognised_by_its_content(write: Write) -> None:
    assert read(write(gzip.compress(as_jsonl(PREFERENCE)), "data.jsonl")) == WANTED
    assert read(write(as_jsonl(PREFERENCE), "data.jsonl.gz")) == WANTED


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"PK\x03\x04...", "it is a zip archive or a spreadsheet; unpack it, or export it as CSV"),
        (b"BZh91AY", "it is a bzip2 file; unpack it"),
        (b"\xfd7zXZ\x00.", "it is an xz file; unpack it"),
        (b"\x28\xb5\x2f\xfd.", "it is a zstd file; unpack it"),
        (b"PAR1....PAR1", "it is a Parquet file; rename it to .parquet"),
        (b"ARROW1\0\0", "it is an Arrow file; write it as Parquet"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "it is a Git LFS pointer, not the file; fetch the file with git lfs pull",
        ),
        (b"<!doctype HTML>\n<html>", "it is a web page; download the file itself"),
        ("prompt,chosen".encode("utf-16"), "it is UTF-16; convert it to UTF-8"),
    ],
)
@pytest.mark.parametrize("name", ["data.csv", "data.jsonl", "data.json", "data.tsv.gz"])
def test_files_of_another_kind_are_named(write: Write, name: str, content: bytes, problem: str) -> None:
    path = write(content, name)
    assert error_of(path) == f"{path}: {problem}"


def test_a_pointer_instead_of_parquet_is_named(write: Write) -> None:
    path = write(b"version https://git-lfs.github.com/spec/v1\n", "data.parquet")
    assert error_of(path) == f"{path}: it is a Git LFS pointer, not the file; fetch the file with git lfs pull"


def test_nul_bytes_are_refused(write: Write) -> None:
    content = as_csv(PREFERENCE).encode()
    path = write(content.replace(b"good 3", b"good\x003"), "data.csv")
    assert error_of(path) == f"{path}: line 5 contains a NUL byte; the file may be UTF-16: convert it to UTF-8"
    path = write(as_csv(PREFERENCE).encode("utf-16-le"), "data.csv")
    assert error_of(path) == f"{path}: line 1 contains a NUL byte; the file may be UTF-16: convert it to UTF-8"


def test_latin_1_is_named_by_its_line(write: Write) -> None:
    path = write(as_jsonl(PREFERENCE).replace(b"good 3", "für 3".encode("latin-1")), "data.jsonl")
    assert error_of(path) == f"{path}: line 4 is not UTF-8 (invalid start byte); convert the file to UTF-8"


# JSON


@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_under_the_name_of_lines_is_recognised(write: Write, indent: int | None) -> None:
    path = write(json.dumps(PREFERENCE, indent=indent), "data.jsonl")
    assert error_of(path) == f"{path}: it is one JSON list, not one object per line; rename it to .json"
    assert error_of(path, skip_bad_rows=True) == error_of(path)


def test_lines_may_end_as_on_windows(write: Write) -> None:
    assert read(write(as_jsonl(PREFERENCE).replace(b"\n", b"\r\n\r\n"), "data.jsonl")) == WANTED
    assert read(write(b"\xef\xbb\xbf" + as_jsonl(PREFERENCE), "data.jsonl")) == WANTED


SHAPE = "must be a list of objects, or an object with a list of objects in 'data'"
COLUMNS = "; it holds whole columns: write it with pandas' to_json(orient='records')"


@pytest.mark.parametrize(
    ("value", "held"),
    [
        ({"train": PREFERENCE, "test": PREFERENCE}, "; it has 'train', 'test': write one of them as a file"),
        ({"version": 1, "rows": PREFERENCE}, "; it has 'rows': write one of them as a file"),
        ({key: [row[key] for row in PREFERENCE] for key in PREFERENCE[0]}, COLUMNS),
        ({key: {str(i): row[key] for i, row in enumerate(PREFERENCE)} for key in PREFERENCE[0]}, COLUMNS),
        (PREFERENCE[0], ""),
        ({}, ""),
        ("text", ""),
    ],
    ids=["splits", "rows", "columns as lists", "columns as objects", "one row", "nothing", "a text"],
)
def test_json_of_another_shape_says_what_it_holds(write: Write, value: Any, held: str) -> None:
    path = write(json.dumps(value), "data.json")
    assert error_of(path) == f"{path}: {SHAPE}{held}"


def test_a_key_with_two_values_is_refused(write: Write) -> None:
    twice = b'{"prompt": "q", "chosen": "a", "rejected": "b", "chosen": "c"}\n'
    problem = "an object has the key 'chosen' twice, with different values"
    path = write(twice + as_jsonl(PREFERENCE), "data.jsonl")
    assert error_of(path) == f"{path}, line 1: {problem}; {REMEDY}"
    assert load_pairs(path, skip_bad_rows=True).skipped == 1
    path = write(b"[" + twice + b"]", "data.json")
    assert error_of(path) == f"{path}: {problem}"


def test_a_key_may_be_repeated_with_its_value(write: Write) -> None:
    content = as_jsonl(PREFERENCE).replace(b'{"prompt"', b'{"id": 1, "id": 1, "prompt"')
    assert read(write(content, "data.jsonl")) == WANTED


# CSV


def test_rows_of_empty_cells_are_blank_lines(write: Write) -> None:
    path = write(as_csv(PREFERENCE) + ",,\r\n\r\n,,\r\n", "data.csv")
    assert read(path) == WANTED


def test_columns_without_a_name_are_ignored(write: Write) -> None:
    """As pandas writes its index, and spreadsheets their empty columns."""
    lines = as_csv(PREFERENCE).splitlines()
    path = write("\n".join(f",{line},," if n == 0 else f"{n},{line},," for n, line in enumerate(lines)), "data.csv")
    assert read(path) == WANTED
    assert load_pairs(path).ignored_columns == ("",)


def test_a_column_with_spaces_around_its_name_is_refused(write: Write) -> None:
    path = write("prompt, chosen, rejected\n" + "q, a, b\n" * 16, "data.csv")
    assert error_of(path) == f"{path}: the column ' chosen' begins or ends with a space; remove it"


@pytest.mark.parametrize(
    ("name", "mark", "remedy"),
    [
        ("data.csv", ";", "write it with commas, as .csv"),
        ("data.csv", "\t", "rename the file to .tsv"),
        ("data.csv", "|", "write it with commas, as .csv"),
        ("data.tsv", ",", "write it with commas, as .csv"),
    ],
)
def test_another_delimiter_is_named(write: Write, name: str, mark: str, remedy: str) -> None:
    path = write(as_csv(PREFERENCE, mark), name)
    header = mark.join(PREFERENCE[0])
    assert error_of(path) == f"{path}: the header {header!r} is one column; if {mark!r} separates its columns, {remedy}"


def test_a_header_alone_has_no_rows(write: Write) -> None:
    path = write("prompt,chosen,rejected\n", "data.csv")
    assert error_of(path) == f"{path}: there are no rows in it"


def test_line_ends_in_cells_are_kept(write: Write) -> None:
    rows = changed(PREFERENCE, 4, chosen="two\r\nlines\n")
    assert read(write(as_csv(rows), "data.csv"))[4] == ("q 4", "two\r\nlines\n", "bad 4")


def test_an_empty_cell_of_csv_is_no_text(write: Write) -> None:
    path = write(as_csv(changed(PREFERENCE, 4, prompt="")), "data.csv")
    assert error_of(path) == f"{path}, line 6, field 'prompt': it is empty; {REMEDY}"


# Parquet and data sets


def test_parquet_holds_nested_lists_with_empty_fields(write: Write) -> None:
    rows: list[dict[str, Any]] = [
        {
            "chosen": [one | {"tool_calls": [], "weight": None} for one in turns(f"q {i}", "yes")],
            "rejected": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": "no", "name": ""}],
        }
        for i in range(16)
    ]
    wanted = load_pairs(write(rows)).pairs()
    assert [good.completion for good, _ in wanted] == ["yes"] * 16
    assert load_pairs(write(as_parquet(rows), "data.parquet")).pairs() == wanted


def test_parquet_of_categories_is_text(write: Write) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = write(b"", "data.parquet")
    table = pyarrow.Table.from_pylist(CONTRAST)
    parquet.write_table(table.set_column(0, "positive", table["positive"].dictionary_encode()), path)
    assert load_pairs(path).pairs() == load_pairs(write(CONTRAST)).pairs()


@pytest.mark.parametrize("form", ["numpy", "arrow"])
def test_the_format_of_a_saved_data_set_does_not_matter(tmp_path: Path, write: Write, form: str) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"chosen": turns(f"q {i}", "yes"), "rejected": turns(f"q {i}", "no")} for i in range(16)]
    datasets.Dataset.from_list(rows).with_format(form).save_to_disk(tmp_path / "saved")
    assert load_pairs(f"hf:{tmp_path / 'saved'}").pairs() == load_pairs(write(rows)).pairs()
