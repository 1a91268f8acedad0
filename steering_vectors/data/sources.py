"""Loading preference data: the choice of the format, renamed columns, and bad rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from steering_vectors.data.cells import is_absent, is_blank
from steering_vectors.data.checks import (
    MOST,
    note_on_columns,
    note_on_scores,
    note_on_systems,
    notes_on,
    repeated_prompts,
)
from steering_vectors.data.columns import OPTIONAL, check_unread, checked_renames, find_kind, renamed
from steering_vectors.data.columns import parse_columns as parse_columns
from steering_vectors.data.preferences import MAX_SKIP_MESSAGES, Kind, Preferences
from steering_vectors.data.records import COLUMNS, PROMPT, SYSTEM, WEIGHT, Record, begins_with_system, read_record
from steering_vectors.data.tables import BadRow, Table, TableRow, read_table
from steering_vectors.errors import DataError

REMEDY = "correct the row, or skip such rows with skip_bad_rows"
DEMO = "demo:"
DEMO_DIRECTORY = Path(__file__).parents[1] / "demo" / "preferences"
TRAINING = ".train.jsonl"


def load_pairs(
    path: str | Path, *, columns: Mapping[str, str] | None = None, skip_bad_rows: bool = False
) -> Preferences:
    """Read preference data: .jsonl, .json, .csv, .tsv or .parquet, also gzipped; `hf:NAME[:split]`; `demo:NAME`.

    The columns are those of TRL's formats: preference {prompt?, chosen, rejected}, unpaired {prompt?, completion,
    label} and contrast {positive, negative}. Texts are plain or lists of chat messages, also written as JSON. In the
    preference format, chosen and rejected may contain the prompt, as messages or as an HH-RLHF transcript. A column
    `system` holds the system prompt, the first message of the row's prompt; then plain prompts are user messages.

    `columns` renames: `{"chosen": "matching"}` reads the column "matching" as chosen, and `{"system": ""}` leaves the
    system prompt out, as `{"prompt": ""}` does the prompt. `{"weight": "votes"}` reads how much each row counts; a
    column of weights is read only if it is named here. Unused columns are listed in `ignored_columns`. `hf:` also
    takes a directory that `datasets` saved. `notes` says what looks mistaken in the rows.

    Raises DataError, with path, line and field, for a bad row, unless `skip_bad_rows` is set, which counts it instead,
    also if a model's chat template or tokenizer refuses it later. Also raises DataError for fewer than 16 usable rows,
    for unpaired data with fewer than 8 of one label, and for texts that repeat their prompt in most rows.
    """
    table = read_table(find_data(str(path)))
    renames = checked_renames(columns or {})
    kind = find_kind(table, renames)
    rows = [row.cells for row in table.rows if isinstance(row.cells, dict)]
    named = [renamed(cells, renames) for cells in rows]
    has_prompts = any(not is_absent(cells.get(PROMPT)) for cells in named)
    systems = sum(not is_blank(cells.get(SYSTEM)) for cells in named)
    filled = [name for name, found in ((PROMPT, has_prompts), (SYSTEM, systems)) if found]
    read = [(row.line, _read(row, kind, renames, filled)) for row in table.rows]
    _check_unread(table, kind, renames, filled, [found for _, found in read if isinstance(found, Record)])
    records, errors = _records(table, kind, renames, skip_bad_rows, read)
    named_too = [WEIGHT] if WEIGHT in renames else []
    used = {renames.get(name, name) for name in (PROMPT, SYSTEM, *named_too, *COLUMNS[kind])} - {""}
    columns_read = (str(column) for cells in rows for column in cells)
    ignored = tuple(dict.fromkeys(column for column in columns_read if column not in used))
    sides = [renames.get(name, name) for name in COLUMNS[kind][: 1 if kind == "unpaired" else 2]]
    ordered = sorted(records, key=lambda one: one[1].positive is None)  # unpaired rows: the preferred ones first
    preferences = Preferences(
        kind=kind,
        positives=tuple(one.positive for _, one in ordered if one.positive is not None),
        negatives=tuple(one.negative for _, one in ordered if one.negative is not None),
        source=table.source,
        sha256=table.sha256,
        skipped=len(errors),
        skip_messages=tuple(error.message for error in errors[:MAX_SKIP_MESSAGES]),
        ignored_columns=ignored,
        notes=(
            *note_on_columns(ignored, rows),
            *note_on_systems(systems, len(rows)),
            *notes_on([record for _, record in records], (sides[0], sides[-1])),
            *note_on_scores(rows),
        ),
        lines=tuple(line for line, _ in ordered),
        fields=(renames.get(PROMPT, PROMPT) if has_prompts else "", sides[0], sides[-1]),
        skip_bad_rows=skip_bad_rows,
        weights=tuple(one.weight for _, one in ordered) if WEIGHT in renames else (),
    )
    preferences.check()
    repeated = repeated_prompts([record for _, record in records])
    if repeated > MOST * len(records):
        raise DataError(
            f"in {repeated} of {len(records)} rows the texts begin with the text of their prompt, which would be read "
            "twice; remove it from the texts, or remove the column of the prompt",
            path=table.source,
        )
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


def _check_unread(
    table: Table, kind: Kind, renames: Mapping[str, str], filled: Collection[str], records: Sequence[Record]
) -> None:
    """Raise DataError if a column of another name seems to hold the prompt, or the system prompt, that no row has."""
    prompts = [one.prompt for record in records for one in (record.positive, record.negative) if one and one.prompt]
    known = {*filled, *renames}
    unchanged = any(name == column for name, column in renames.items())  # as typed before prompt= left out the prompt
    if PROMPT not in known and not prompts and not unchanged:
        check_unread(table, kind, renames, PROMPT)
    if SYSTEM not in known and prompts and not any(begins_with_system(prompt) for prompt in prompts):
        check_unread(table, kind, renames, SYSTEM)


def _records(
    table: Table,
    kind: Kind,
    renames: Mapping[str, str],
    skip_bad_rows: bool,
    read: Sequence[tuple[int, Record | BadRow]],
) -> tuple[list[tuple[int, Record]], list[DataError]]:
    """The usable rows with their lines, and an error for each of the others. Raises the first error unless bad rows are
    skipped."""
    forms = [record for _, record in read if isinstance(record, Record)]
    chat = sum(record.chat for record in forms) * 2 > len(forms)  # the form of most rows is the right one
    usual = next((record.form for record in forms if record.chat == chat), "")
    records: list[tuple[int, Record]] = []
    errors: list[DataError] = []
    for line, found in read:
        if isinstance(found, Record) and found.chat != chat:
            found = BadRow(f"it contains {found.form}, but most rows contain {usual}", COLUMNS[kind][0])
        if isinstance(found, Record):
            records.append((line, found))
            continue
        column, *place = (found.field or "").partition("[")  # a field is as chosen[2].content
        field = "".join([renames.get(column, column), *place]) or None  # with the file's name of the column
        message = found.message if skip_bad_rows else f"{found.message}; {REMEDY}"
        errors.append(DataError(message, path=table.source, line=line, field=field))
        if not skip_bad_rows:
            raise errors[0] from found
    return records, errors


def _read(row: TableRow, kind: Kind, renames: Mapping[str, str], filled: Collection[str]) -> Record | BadRow:
    if isinstance(row.cells, BadRow):
        return row.cells
    try:
        return read_record(kind, _cells(row.cells, renames, filled))
    except BadRow as bad:
        return bad


def _cells(cells: Mapping[str, Any], renames: Mapping[str, str], filled: Collection[str]) -> dict[str, Any]:
    """The cells by the format's names, and of the optional ones those that are filled in some row."""
    found = renamed(cells, renames)
    unread = {*OPTIONAL} if WEIGHT in renames else {*OPTIONAL, WEIGHT}
    return {name: value for name, value in found.items() if name not in unread} | {n: found.get(n) for n in filled}
