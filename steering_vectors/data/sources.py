"""Loading preference data: the choice of the format, renamed columns, and bad rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steering_vectors.data.preferences import Kind, Preferences
from steering_vectors.data.records import COLUMNS, PROMPT, Record, read_record
from steering_vectors.data.tables import BadRow, Table, read_table
from steering_vectors.errors import DataError

MAX_SKIP_MESSAGES = 5
REMEDY = "correct the row, or skip such rows with skip_bad_rows"
DEMO = "demo:"
DEMO_DIRECTORY = Path(__file__).parents[1] / "demo" / "preferences"
TRAINING = ".train.jsonl"
FORMATS = "{prompt, chosen, rejected}, {prompt, completion, label} or {positive, negative}"


def load_pairs(
    path: str | Path, *, columns: Mapping[str, str] | None = None, skip_bad_rows: bool = False
) -> Preferences:
    """Read preference data: .jsonl, .json, .csv, .tsv or .parquet, also with .gz; `hf:NAME[:split]`; `demo:NAME`.

    The columns are those of TRL's formats: preference {prompt, chosen, rejected}, unpaired {prompt?, completion, label}
    and contrast {positive, negative}. Texts are plain or lists of chat messages. In the preference format, chosen and
    rejected may contain the prompt, as messages or as an HH-RLHF transcript. `columns` renames: `{"chosen":
    "matching"}` reads the column "matching" as chosen. Unused columns are listed in `ignored_columns`. `hf:` also takes
    a directory that `datasets` saved.

    Raises DataError, with path, line and field, for a bad row, unless `skip_bad_rows` is set, which counts it instead.
    Also raises DataError for fewer than 16 usable rows, and for unpaired data with fewer than 8 of one label.
    """
    table = read_table(find_data(str(path)))
    renames = _checked_renames(columns or {})
    kind = _kind_of(table, renames)
    records, errors = _records(table, kind, renames, skip_bad_rows)
    used = {renames.get(name, name) for name in (PROMPT, *COLUMNS[kind])}
    columns_read = (str(column) for row in table.rows if isinstance(row.cells, dict) for column in row.cells)
    preferences = Preferences(
        kind=kind,
        positives=tuple(one.positive for one in records if one.positive is not None),
        negatives=tuple(one.negative for one in records if one.negative is not None),
        source=table.source,
        sha256=table.sha256,
        skipped=len(errors),
        skip_messages=tuple(error.message for error in errors[:MAX_SKIP_MESSAGES]),
        ignored_columns=tuple(dict.fromkeys(column for column in columns_read if column not in used)),
    )
    preferences.check()
    return preferences


def find_data(path: str) -> str:
    """The file of the embedded data set `demo:NAME`; other paths unchanged. Raises DataError, which lists the sets."""
    if not path.startswith(DEMO):
        return path
    file = DEMO_DIRECTORY / f"{path.removeprefix(DEMO)}{TRAINING}"
    if not file.is_file():
        names = sorted(file.name.removesuffix(TRAINING) for file in DEMO_DIRECTORY.glob(f"*{TRAINING}"))
        raise DataError(f"{path!r} is not an embedded data set; use demo: with one of {', '.join(names) or 'none'}")
    return str(file)


def parse_columns(text: str) -> dict[str, str]:
    """Read `prompt=question,chosen=matching` as the `columns` of `load_pairs`. Raises DataError."""
    renames: dict[str, str] = {}
    for part in text.split(","):
        name, equals, column = (piece.strip() for piece in part.partition("="))
        if not (name and equals and column) or name in renames:
            raise DataError(f"columns {text!r} cannot be read; write prompt=question,chosen=matching")
        renames[name] = column
    return _checked_renames(renames)


def _checked_renames(renames: Mapping[str, str]) -> dict[str, str]:
    known = [PROMPT, *(column for columns in COLUMNS.values() for column in columns)]
    for name in renames:
        if name not in known:
            raise DataError(f"columns: {name!r} is not a column of any format; rename to one of {', '.join(known)}")
    return dict(renames)


def _kind_of(table: Table, renames: Mapping[str, str]) -> Kind:
    """The format of the first complete row, else that of the first row with a column of any format."""
    rows = [_renamed(row.cells, renames) for row in table.rows if not isinstance(row.cells, BadRow)]
    allowed = [kind for kind, columns in COLUMNS.items() if set(renames) - {PROMPT} <= set(columns)]
    for wanted in (all, any):
        for cells in rows:
            fits = [kind for kind in allowed if wanted(column in cells for column in COLUMNS[kind])]
            if wanted is all and len(fits) > 1:
                message = f"the columns fit the formats {' and '.join(fits)}; choose one with columns"
                raise DataError(message, path=table.source)
            if fits:
                return fits[0]
    if not table.rows:
        raise DataError("there are no rows in it", path=table.source)
    row = table.rows[0]
    if isinstance(row.cells, BadRow):
        raise DataError(row.cells.message, path=table.source, line=row.line)
    found = ", ".join(map(str, row.cells)) or "none"
    raise DataError(
        f"the columns ({found}) fit none of the formats {FORMATS}; rename them, as in "
        "columns prompt=question,chosen=good,rejected=bad",
        path=table.source,
        line=row.line,
    )


def _renamed(cells: Mapping[str, Any], renames: Mapping[str, str]) -> dict[str, Any]:
    taken = {*renames, *renames.values()}
    kept = {column: value for column, value in cells.items() if column not in taken}
    return kept | {name: cells[column] for name, column in renames.items() if column in cells}


def _records(
    table: Table, kind: Kind, renames: Mapping[str, str], skip_bad_rows: bool
) -> tuple[list[Record], list[DataError]]:
    """The usable rows, and an error for each of the others. Raises the first error unless bad rows are skipped."""
    records: list[Record] = []
    errors: list[DataError] = []
    for row in table.rows:
        try:
            if isinstance(row.cells, BadRow):
                raise row.cells
            record = read_record(kind, _renamed(row.cells, renames))
            if records and record.form != records[0].form:
                message = f"it contains {record.form}, but earlier rows contain {records[0].form}"
                raise BadRow(message, COLUMNS[kind][0])
            records.append(record)
        except BadRow as bad:
            column, *place = (bad.field or "").partition("[")  # a field is as chosen[2].content
            field = "".join([renames.get(column, column), *place]) or None  # with the file's name of the column
            message = bad.message if skip_bad_rows else f"{bad.message}; {REMEDY}"
            errors.append(DataError(message, path=table.source, line=row.line, field=field))
            if not skip_bad_rows:
                raise errors[0] from bad
    return records, errors
