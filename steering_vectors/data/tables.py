"""Reading tables: JSONL, JSON, CSV, TSV and Parquet files, each also gzipped, and data sets of the `datasets` package.

A row that cannot be read becomes a `BadRow`, so that the caller decides whether to skip it.
"""

from __future__ import annotations

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
        raise DataError(f"the file name must end in {known}, optionally with .gz; rename or convert it", path=source)
    try:
        data = Path(source).read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"cannot be read ({reason}); check the path", path=source) from error
    try:
        plain = gzip.decompress(data) if source.lower().endswith(".gz") else data
        rows = list(READERS[suffixes[-1]](plain))
    except BadRow as error:
        raise DataError(error.message, path=source) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"not a complete gzip file ({error}); copy it again", path=source) from error
    return Table(source, hashlib.sha256(data).hexdigest(), rows)


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadRow(f"line {line} is not UTF-8 ({error.reason}); convert the file to UTF-8") from error


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"not valid JSON ({error})") from error


def _object(line: int, value: Any) -> TableRow:
    if isinstance(value, dict):
        return TableRow(line, value)
    return TableRow(line, BadRow(f"must be a JSON object, not {type(value).__name__}"))


def _read_jsonl(data: bytes) -> Iterator[TableRow]:
    for number, line in enumerate(_text(data).split("\n"), start=1):
        if line.strip():
            try:
                yield _object(number, _parse_json(line))
            except BadRow as error:
                yield TableRow(number, error)


def _read_json(data: bytes) -> Iterable[TableRow]:
    try:
        value = _parse_json(_text(data))
    except BadRow as error:
        raise BadRow(f"{error.message}; if the file has one object per line, rename it to .jsonl") from error
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise BadRow("must be a list of objects, or an object with a list of objects in 'data'")
    return starmap(_object, enumerate(rows, start=1))


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
                if repeated := sorted({name for name in record if record.count(name) > 1}):
                    raise BadRow(f"the header contains the column {repeated[0]!r} twice; rename one")
                header = record
            elif record and len(record) == len(header):
                yield TableRow(begin, dict(zip(header, record, strict=True)))
            elif record:
                yield TableRow(begin, BadRow(f"has {len(record)} cells, but the header has {len(header)}"))
            begin = reader.line_num + 1
    except csv.Error as error:
        raise BadRow(f"the row that begins on line {begin} has invalid quoting ({error}); correct it") from error


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
    rows = [dict(row) for row in found]
    canonical = json.dumps(rows, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str)
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    return Table(source, digest, list(starmap(TableRow, enumerate(rows, start=1))))
