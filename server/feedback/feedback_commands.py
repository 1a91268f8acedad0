"""`trimtab feedback`: export, import and delete feedback, in the database itself. A server may run meanwhile."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from server.feedback.database import Database

feedback = typer.Typer(no_args_is_help=True, help="Export, import and delete the feedback of a server.")

DatabaseUrl = Annotated[
    str,
    typer.Option(
        "--feedback-database", help="The database: a file, or a postgresql:// URL.", envvar="TRIMTAB_FEEDBACK_DATABASE"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
TOGETHER = 500  # rows of one commit
PROGRESS_SECONDS = 1.0


class Format(StrEnum):
    trl = "trl"
    raw = "raw"


class RowsName(StrEnum):
    preference = "preference"
    unpaired = "unpaired"


class KindName(StrEnum):
    pair = "pair"
    thumb = "thumb"
    rating = "rating"
    edit = "edit"
    signal = "signal"
    comment = "comment"


@feedback.command()
def export(
    feedback_database: DatabaseUrl,
    out: Annotated[Path, typer.Option(help="The file to write, as JSON lines. It is replaced as a whole.")],
    format_: Annotated[
        Format, typer.Option("--format", help="trl: rows for `trimtab fit`; raw: all that is stored, for `import`.")
    ] = Format.trl,
    rows: Annotated[
        RowsName,
        typer.Option(
            help="Of the format trl: preference (prompt, chosen, rejected) has pairs and edits, unpaired (prompt, "
            "completion, label) has thumbs and ratings."
        ),
    ] = RowsName.preference,
    profile: Annotated[
        str | None, typer.Option(help="Only feedback on answers that this profile steered: NAME or NAME#SHA8.")
    ] = None,
    kind: Annotated[KindName | None, typer.Option(help="Only this kind.")] = None,
    json_: AsJson = False,
) -> None:
    """Write feedback into a file."""
    from server.feedback import queries
    from server.feedback.items import Filter
    from server.feedback.trl import Exported, raw_rows, trl_rows

    wanted = Filter(kind=kind.value if kind else None, profile=profile)
    counts = Exported()
    with _opened(feedback_database) as database, database.reading() as connection:
        progress = _Progress(queries.count(connection, wanted))
        stored = progress.over(queries.everything(connection, wanted))
        made = raw_rows(stored, counts) if format_ == Format.raw else trl_rows(stored, rows.value, counts)
        _write_lines(out, made)
    if json_:
        print(json.dumps({"out": str(out), "rows": counts.rows, "left_out": dict(counts.left_out)}))
        return
    print(f"wrote {counts.rows} rows into {out}", file=sys.stderr)
    for reason, count in counts.left_out.items():
        print(f"left out {count}: {reason}", file=sys.stderr)


@feedback.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A file of JSON lines: raw, or TRL's preference or unpaired rows.")],
    feedback_database: DatabaseUrl,
    json_: AsJson = False,
) -> None:
    """Read feedback from a file. What is there already, and what belongs to a deleted user, is left out."""
    from server.feedback import queries
    from server.feedback.trl import read_rows
    from steering_vectors.errors import DataError

    counts: Counter[str] = Counter()
    with _opened(feedback_database) as database:
        try:
            with file.open(encoding="utf-8") as lines:
                read = _Progress(None).over(read_rows(lines, str(file), time.time()))
                while batch := list(islice(read, TOGETHER)):
                    with database.writing() as connection:
                        counts.update(queries.restore(connection, one) for one in batch)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"it cannot be read ({type(error).__name__})", path=str(file)) from error
    found = {name: counts[name] for name in ("added", "known", "deleted_user")}
    if json_:
        print(json.dumps(found))
    else:
        known = f"{found['known']} were known, {found['deleted_user']} belong to deleted users"
        print(f"added {found['added']} pieces of feedback; {known}", file=sys.stderr)


@feedback.command()
def delete(
    feedback_database: DatabaseUrl,
    user: Annotated[str, typer.Option(help="The user whose feedback and generations are deleted.")],
    json_: AsJson = False,
) -> None:
    """Delete a user's feedback, their kept generations, and the feedback of others on these."""
    from server.feedback import queries
    from server.feedback.items import UnknownUser, user_id

    with _opened(feedback_database) as database:
        with database.writing() as connection:
            found = queries.delete_user(connection, user_id(user) or "", time.time())
        if found is None:
            raise UnknownUser(f"nothing is stored of the user {user!r}", param="user")
        database.forget()
    if json_:
        described = {"feedback": found.feedback, "about_user": found.about_user, "generations": found.generations}
        print(json.dumps(described))
        return
    deleted = f"{found.feedback} pieces of feedback, {found.about_user} of others"
    print(f"deleted {deleted}, and {found.generations} generations", file=sys.stderr)


@contextmanager
def _opened(url: str) -> Iterator[Database]:
    from server.settings import ConfigurationError

    try:
        from server.feedback.database import Database
    except ImportError as error:
        message = "feedback needs SQLAlchemy and Alembic: pip install 'trimtab[feedback]'"
        raise ConfigurationError(message) from error
    database = Database(url)
    try:
        database.migrate()
        yield database
    finally:
        database.close()


def _write_lines(out: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Write a file for its owner only, whole or not at all. Raises ConfigurationError."""
    import os

    from server.settings import ConfigurationError

    part = out.with_name(f"{out.name}.part")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(out)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ConfigurationError(f"cannot write {out}: {error.strerror}; choose another --out") from error


class _Progress:
    """A line on stderr now and then: how many of how many."""

    def __init__(self, total: int | None) -> None:
        self._of = "" if total is None else f" of {total}"
        self._last = time.monotonic()

    def over(self, stored: Iterator[Any]) -> Iterator[Any]:
        for number, one in enumerate(stored, start=1):
            if time.monotonic() - self._last > PROGRESS_SECONDS:
                self._last = time.monotonic()
                print(f"{number}{self._of} pieces of feedback", file=sys.stderr)
            yield one
