"""Folders of work: rows that survive a killed run and edits, and files that are made from others."""

from __future__ import annotations

from pathlib import Path

import pytest

from steering_vectors.errors import DataError
from steering_vectors.synthesis.folder import Folder, by_key, key_of

ROWS = [{"key": "a", "text": "één"}, {"key": "b", "text": "two\nlines"}]


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    assert folder.rows("rows.jsonl") == []
    folder.append("rows.jsonl", ROWS[:1])
    folder.append("rows.jsonl", ROWS[1:])
    assert folder.rows("rows.jsonl", ("key", "text")) == ROWS
    assert by_key([*ROWS, {"key": "a", "text": "new"}])["a"]["text"] == "new"


@pytest.mark.parametrize(("end", "kept"), [('{"key": "c", "te', 2), ('{"key": "c", "text": "x"}', 3), ("\n\n", 2)])
def test_a_last_line_without_an_end(tmp_path: Path, end: str, kept: int) -> None:
    folder = Folder(tmp_path)
    folder.append("rows.jsonl", ROWS)
    with folder.file("rows.jsonl").open("a") as file:
        file.write(end)
    assert len(folder.rows("rows.jsonl")) == kept
    folder.append("rows.jsonl", [{"key": "d", "text": "y"}])
    assert [row["key"] for row in folder.rows("rows.jsonl")] == ["a", "b", *"c" * (kept - 2), "d"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"key": "a"\n{"key": "b", "text": "x"}\n', "line 1: it is no JSON"),
        ('{"key": "b", "text": "x"}\n[1]\n', "line 2: the line is no JSON object"),
        ('{"key": "b", "text": " "}\n', "line 1, field 'text': it must be a text that is not blank"),
        ('{"key": "b"}\n', "line 1, field 'text': it must be a text that is not blank"),
        ('{"key": "b", "text": "\\ud800"}\n', "line 1: it contains half of a surrogate pair"),
    ],
)
def test_a_row_that_was_edited_into_nothing_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        Folder(tmp_path).rows("rows.jsonl", ("key", "text"))


def test_values_that_are_no_object(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    assert folder.values("values.json") == {}
    folder.set_values("values.json", {"a": 1})
    assert folder.values("values.json") == {"a": 1}
    folder.file("values.json").write_text("[1]")
    with pytest.raises(DataError, match="it holds no JSON object"):
        folder.values("values.json")
    folder.file("values.json").write_text("{")
    with pytest.raises(DataError, match="it cannot be read as JSON"):
        folder.values("values.json")


def test_a_file_is_made_once_and_edits_stay(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    assert folder.made("rows.jsonl", "1", lambda: ROWS)
    assert not folder.made("rows.jsonl", "1", list)
    assert folder.made("rows.jsonl", "2", lambda: ROWS[:1])
    folder.append("rows.jsonl", ROWS[1:])
    assert not folder.made("rows.jsonl", "2", list)
    assert folder.rows("rows.jsonl") == ROWS
    with pytest.raises(DataError, match=r"rows\.jsonl was edited, and what it is made from has changed"):
        folder.made("rows.jsonl", "3", list)
    folder.file("rows.jsonl").unlink()
    assert folder.made("rows.jsonl", "3", list)


def test_a_file_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="was not made here"):
        Folder(tmp_path).made("rows.jsonl", "1", lambda: ROWS)


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    with Folder(tmp_path), pytest.raises(DataError, match="another process works in"), Folder(tmp_path):
        pass


def test_keys_depend_on_every_part() -> None:
    keys = {key_of("a", "b"), key_of("ab"), key_of("a", "b", 0), key_of("a", None), key_of({"a": "b"})}
    assert len(keys) == 5
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
