"""Where feedback comes from: a server's database, or a file that `trimtab feedback export` has written."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from server.feedback.items import Filter, Stored
from server.feedback.trl import read_rows
from server.settings import ConfigurationError
from steering_vectors.errors import DataError


@dataclass(frozen=True, slots=True)
class FeedbackSource:
    """A database (a file of SQLite, or a postgresql:// URL), or a file of JSON lines. Raises ConfigurationError unless
    it is one of both."""

    database: str | None = None
    file: Path | None = None

    def __post_init__(self) -> None:
        if (self.database is None) == (self.file is None):
            raise ConfigurationError("name the feedback by either feedback_database or feedback_file")

    def of_profile(self, name: str, *, every: bool = False) -> list[Stored]:
        """The feedback on answers that a profile steered, in the order of its storage; of a file, also what does not
        say how its answers were steered. With `every`, all feedback. Raises ConfigurationError and DataError."""
        if self.file is None:
            return list(self._stored(Filter(profile=None if every else name)))
        return [one for one in self._rows(self.file) if every or _may_be_of(one, name)]

    def since(self, name: str, begin: float) -> list[Stored]:
        """The feedback on answers that a profile steered, given since a Unix time."""
        return list(self._stored(Filter(profile=name, since=begin)))

    def _stored(self, wanted: Filter) -> Iterator[Stored]:
        try:
            from server.feedback import queries
            from server.feedback.database import Database
        except ImportError as error:
            message = "feedback needs SQLAlchemy and Alembic: pip install 'trimtab[feedback]'"
            raise ConfigurationError(message) from error
        if self.database is None:
            raise ConfigurationError("live feedback is in a database: name it by feedback_database")
        database = Database(self.database)
        try:
            database.migrate()
            with database.reading() as connection:
                yield from queries.everything(connection, wanted)
        finally:
            database.close()

    def _rows(self, file: Path) -> Iterator[Stored]:
        try:
            with file.open(encoding="utf-8") as lines:
                yield from read_rows(lines, str(file), time.time())
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"it cannot be read ({type(error).__name__})", path=str(file)) from error


def steered_by(one: Stored) -> Iterable[str]:
    """The names of the profiles that steered the answers of a piece of feedback."""
    return (receipt["name"] for answer in one.answers for receipt in answer.get("steering", ()))


def _may_be_of(one: Stored, name: str) -> bool:
    unknown = all("steering" not in answer for answer in one.answers)
    return unknown or name in steered_by(one)
