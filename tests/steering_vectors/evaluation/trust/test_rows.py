"""Files of the verticals: their location, bad cells, and the selection of rows."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from steering_vectors.errors import DataError
from steering_vectors.evaluation.trust.rows import find_files, read_source, select, text_cell
from tests.support.trust_files import sentence_pairs, write_rows


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file crows-pairs/\*\.csv for the vertical bias.*leave the vertical out"):
        find_files(tmp_path, "bias")


def test_all_files_of_a_vertical_are_read_gzipped_too(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "crows-pairs" / "a.csv", sentence_pairs(8))
    (tmp_path / "crows-pairs" / "b.csv.gz").write_bytes(gzip.compress(one.read_bytes()))
    source = read_source(tmp_path, "bias", lambda cells: cells["sent_more"])
    assert source.rows == [row["sent_more"] for row in sentence_pairs(8)] * 2
    assert [file["file"] for file in source.files] == ["a.csv", "b.csv.gz"]
    assert len(source.files[0]["sha256"]) == 64


def test_a_bad_cell_is_located(tmp_path: Path) -> None:
    rows = sentence_pairs(9)
    rows[4]["sent_less"] = " "
    path = write_rows(tmp_path / "crows-pairs" / "a.csv", rows)
    with pytest.raises(DataError, match=f"{path}, line 6, field 'sent_less': must be a non-empty text"):
        read_source(tmp_path, "bias", lambda cells: text_cell(cells, "sent_less"))
    with pytest.raises(DataError, match="line 2, field 'sent_lesser': is missing; the row has , sent_more, sent_less"):
        read_source(tmp_path, "bias", lambda cells: text_cell(cells, "sent_lesser"))


@pytest.mark.parametrize("rows", [0, 7])
def test_too_few_rows(tmp_path: Path, rows: int) -> None:
    write_rows(tmp_path / "crows-pairs" / "a.csv", sentence_pairs(rows))
    with pytest.raises(DataError, match=f"contains {rows} rows, but bias needs at least 8"):
        read_source(tmp_path, "bias", lambda cells: cells)


def test_rows_are_drawn_by_seed_and_those_left_out_are_counted() -> None:
    def drawn(seed: int, most: int) -> tuple[list[int], int]:
        return select(range(100), most, seed, lambda row: row, lambda row: row % 2 == 0)

    assert drawn(0, 20) == drawn(0, 20) != drawn(1, 20)
    rows, left_out = drawn(0, 20)
    assert rows == sorted(rows)
    assert len(rows) == 20
    assert 0 < left_out < 50
    assert drawn(0, 1000) == (list(range(0, 100, 2)), 50)
