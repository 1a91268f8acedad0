"""`trimtab feedback`: export, import and delete feedback, in the database itself. A server may run meanwhile."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from server.feedback.database import Database
    from steering_vectors.progress import Progress

feedback = typer.Typer(no_args_is_help=True, help="Export, import and delete the feedback of a server.")

DatabaseUrl = Annotated[
    str,
    typer.Option(
        "--feedback-database", help="The database: a file, or a postgresql:// URL.", envvar="TRIMTAB_FEEDBACK_DATABASE"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
TOGETHER = 500  # rows of one commit

T = TypeVar("T")


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
    from steering_vectors.reports.terminal import progress_on_stderr

    wanted = Filter(kind=kind.value if kind else None, profile=profile)
    counts = Exported()
    with (
        _opened(feedback_database) as database,
        database.reading() as connection,
        progress_on_stderr(quiet=json_) as progress,
    ):
        total = queries.count(connection, wanted)
        stored = _counted(queries.everything(connection, wanted), "export", total, progress)
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
    from server.feedback import adding
    from server.feedback.trl import read_rows
    from steering_vectors.errors import DataError
    from steering_vectors.reports.terminal import progress_on_stderr

    counts: Counter[str] = Counter()
    with _opened(feedback_database) as database:
        try:
            with file.open(encoding="utf-8") as lines, progress_on_stderr(quiet=json_) as progress:
                total = sum(1 for _ in lines)
                lines.seek(0)
                read = _counted(read_rows(lines, str(file), time.time()), "import", total, progress)
                while batch := list(islice(read, TOGETHER)):
                    with database.writing() as connection:
                        counts += adding.restore(connection, batch)
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


def _counted(rows: Iterable[T], stage: str, total: int, progress: Progress | None) -> Iterator[T]:
    """The rows, whose number is shown as they go."""
    for number, row in enumerate(rows, start=1):
        if progress is not None:
            progress(stage, number, max(number, total))
        yield row
