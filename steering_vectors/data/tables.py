"""Reading tables: JSONL, JSON, CSV, TSV and Parquet files, each also gzipped, and data sets of the `datasets` package.

A row that cannot be read becomes a `BadRow`, so that the caller decides whether to skip it.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import Any

from steering_vectors.errors import DataError

HUB_PREFIX = "hf:"
DEFAULT_SPLIT = "train"
INSTALL = "pip install 'trimtab[data]'"
GZIP = b"\x1f\x8b"
CONTENTS = {  # of files that are not what their names say: how they begin, what they are, and the remedy
    b"PK\x03\x04": ("a zip archive or a spreadsheet", "unpack it, or export it as CSV"),
    b"BZh": ("a bzip2 file", "unpack it"),
    b"\xfd7zXZ\x00": ("an xz file", "unpack it"),
    b"\x28\xb5\x2f\xfd": ("a zstd file", "unpack it"),
    b"PAR1": ("a Parquet file", "rename it to .parquet"),
    b"ARROW1": ("an Arrow file", "write it as Parquet"),
    b"version https://git-lfs": ("a Git LFS pointer, not the file", "fetch the file with git lfs pull"),
    b"<!DOCTYPE html": ("a web page", "download the file itself"),
    b"<html": ("a web page", "download the file itself"),
    codecs.BOM_UTF16_LE: ("UTF-16", "convert it to UTF-8"),
    codecs.BOM_UTF16_BE: ("UTF-16", "convert it to UTF-8"),
}


class BadRow(Exception):
    """An error in one row and column. A caller that knows the file and the line turns it into a DataError."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.message, self.field = message, field


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row: its 1-based line in the file (its number in JSON, Parquet and hub data) and its cells by column."""

    line: int
    cells: dict[str, Any] | BadRow


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of a source, and the sha256 of its bytes (for hub data, of its rows as canonical JSON)."""

    source: str
    sha256: str
    rows: list[TableRow]


def read_table(source: str) -> Table:
    """Read a file by its extension, or `hf:NAME[:split]`. Raises DataError if the file as a whole is unreadable."""
    if source.startswith(HUB_PREFIX):
        return _read_hub(source)
    suffixes = [suffix.lower() for suffix in Path(source).suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    if not suffixes or suffixes[-1] not in READERS:
        known = ", ".join(READERS)
        raise DataError(
            f"the file name must end in {known}, optionally with .gz; rename it, or write its texts in columns, "
            "such as completion and label",
            path=source,
        )
    try:
        data = Path(source).read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"cannot be read ({reason}); check the path", path=source) from error
    try:
        plain = gzip.decompress(data) if data.startswith(GZIP) else data
        _check_content(plain, suffixes[-1])
        rows = list(READERS[suffixes[-1]](plain))
    except BadRow as error:
        raise DataError(error.message, path=source) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"not a complete gzip file ({error}); copy it again", path=source) from error
    return Table(source, hashlib.sha256(data).hexdigest(), rows)


def _check_content(data: bytes, suffix: str) -> None:
    """Raise BadRow for content of another kind than the file name says, as far as its first bytes show."""
    for start, (kind, remedy) in CONTENTS.items():
        if data[: len(start)].lower() == start.lower() and not (start == b"PAR1" and suffix == ".parquet"):
            raise BadRow(f"it is {kind}; {remedy}")


def _text(data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadRow(f"line {line} is not UTF-8 ({error.reason}); convert the file to UTF-8") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise BadRow(f"line {line} contains a NUL byte; the file may be UTF-16: convert it to UTF-8")
    return text


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object_of)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"not valid JSON ({error})") from error


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs. Raises BadRow for a key that has two different values."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise BadRow(f"an object has the key {key!r} twice, with different values")
        found[key] = value
    return found


def _object(line: int, value: Any) -> TableRow:
    if isinstance(value, dict):
        return TableRow(line, value)
    return TableRow(line, BadRow(f"must be a JSON object, not {type(value).__name__}"))


def _read_jsonl(data: bytes) -> Iterator[TableRow]:
    text = _text(data)
    if text.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            json.loads(text)
            raise BadRow("it is one JSON list, not one object per line; rename it to .json")
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield _object(number, _parse_json(line))
            except BadRow as error:
                yield TableRow(number, error)


def _read_json(data: bytes) -> Iterable[TableRow]:
    try:
        value = _parse_json(_text(data))
    except BadRow as error:
        lines = "; if the file has one object per line, rename it to .jsonl" if "Extra data" in error.message else ""
        raise BadRow(f"{error.message}{lines}") from error
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise BadRow(f"must be a list of objects, or an object with a list of objects in 'data'{_shape(value)}")
    return starmap(_object, enumerate(rows, start=1))


def _shape(value: Any) -> str:
    """What another JSON value holds, for the message."""
    if not isinstance(value, dict) or not value:
        return ""
    columns = [name for name, column in value.items() if isinstance(column, dict | list) and not _are_rows(column)]
    if len(columns) == len(value):
        return "; it holds whole columns: write it with pandas' to_json(orient='records')"
    rows = [name for name, column in value.items() if _are_rows(column)]
    return f"; it has {', '.join(map(repr, list(rows or value)[:5]))}: write one of them as a file" if rows else ""


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _read_tsv(data: bytes) -> Iterable[TableRow]:
    """Cells are quoted as in CSV. If the quotes do not match, they are read as plain characters."""
    text = _text(data)
    try:
        return list(_delimited(text, delimiter="\t", strict=True))
    except BadRow:
        return _delimited(text, delimiter="\t", quoting=csv.QUOTE_NONE)


def _delimited(text: str, **dialect: Any) -> Iterator[TableRow]:
    before = csv.field_size_limit()
    csv.field_size_limit(max(before, len(text)))
    try:
        yield from _records(csv.reader(io.StringIO(text, newline=""), **dialect))
    finally:
        csv.field_size_limit(before)


def _records(reader: Any) -> Iterator[TableRow]:
    """Rows of a csv reader, with the line on which each begins. Rows after a quoting error cannot be read."""
    header: list[str] | None = None
    begin = 1
    try:
        for record in reader:
            if header is None:
                _check_header(record)
                header = record
            elif not any(record):  # a blank line, or one of delimiters only, as spreadsheets write
                pass
            elif len(record) == len(header):
                yield TableRow(begin, dict(zip(header, record, strict=True)))
            else:
                yield TableRow(begin, BadRow(f"has {len(record)} cells, but the header has {len(header)}"))
            begin = reader.line_num + 1
    except csv.Error as error:
        raise BadRow(f"the row that begins on line {begin} has invalid quoting ({error}); correct it") from error


def _check_header(names: list[str]) -> None:
    """Raise BadRow for a column without a name of its own, and for a header that other characters divide."""
    if repeated := sorted({name for name in names if name and names.count(name) > 1}):
        raise BadRow(f"the header contains the column {repeated[0]!r} twice; rename one")
    if spaced := [name for name in names if name != name.strip()]:
        raise BadRow(f"the column {spaced[0]!r} begins or ends with a space; remove it")
    if len(names) == 1 and (found := [mark for mark in ",;\t|" if mark in names[0]]):
        remedy = "rename the file to .tsv" if found[0] == "\t" else "write it with commas, as .csv"
        raise BadRow(f"the header {names[0]!r} is one column; if {found[0]!r} separates its columns, {remedy}")


def _read_parquet(data: bytes) -> Iterable[TableRow]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise BadRow(f"reading Parquet needs the package pyarrow: {INSTALL}") from error
    try:
        rows = pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise BadRow(f"not a complete Parquet file ({error}); copy it again") from error
    return starmap(TableRow, enumerate(rows, start=1))


READERS: dict[str, Callable[[bytes], Iterable[TableRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": lambda data: _delimited(_text(data), delimiter=",", strict=True),
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}


def _read_hub(source: str) -> Table:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"reading it needs the package datasets: {INSTALL}", path=source) from error
    name, split = source.removeprefix(HUB_PREFIX), None
    if ":" in name and not Path(name).is_dir():
        name, _, split = name.rpartition(":")
    try:
        found = datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name)
    except Exception as error:  # `datasets` raises errors of the network, of file systems and of parsers
        raise DataError(f"cannot be loaded ({error}); check the name and the network", path=source) from error
    if isinstance(found, dict):
        chosen = split or (next(iter(found)) if len(found) == 1 else DEFAULT_SPLIT)
        if chosen not in found:
            raise DataError(f"there is no split {chosen!r}; use one of {', '.join(map(str, found))}", path=source)
        found = found[chosen]
    elif split not in (None, str(getattr(found, "split", None))):
        raise DataError(f"the data set is a single split without a name; remove {split!r}", path=source)
    rows = [dict(row) for row in found.with_format(None)]  # Python's values, whatever format was saved
    canonical = json.dumps(rows, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str)
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    return Table(source, digest, list(starmap(TableRow, enumerate(rows, start=1))))
