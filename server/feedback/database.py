"""The feedback database: its URL, its connections, its migrations, and transactions that write one after the other.

SQLAlchemy is used without asyncio: all writes of a server are made by one thread, which commits many at once, and the
commands have no event loop. The drivers are Python's own sqlite3 and psycopg 3.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError, SQLAlchemyError

from server.settings import ConfigurationError
from steering_vectors.errors import first_line

T = TypeVar("T")

MIGRATIONS = Path(__file__).resolve().parent / "migrations"
ADVISORY_LOCK = 0x7472696D746162  # of PostgreSQL; one writer at a time, as SQLite has it
LOCK = text("SELECT pg_advisory_xact_lock(:lock)")
BUSY_SECONDS = 15.0  # for which a writer waits for another one
CONNECT_SECONDS = 60.0  # for which a server waits for its database at start

logging.getLogger("alembic").setLevel(logging.WARNING)  # it says at length what it is made of


class Database:
    """One database. `migrate` brings it to the version of this program; nothing is read or written before that."""

    def __init__(self, url: str) -> None:
        """Raises ConfigurationError for a URL that cannot be used. Connects to nothing yet."""
        self.url = database_url(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        try:
            self.engine = _sqlite_engine(self.url) if self.is_sqlite else _postgres_engine(self.url)
        except (ArgumentError, NoSuchModuleError, ImportError) as error:
            raise ConfigurationError(_needs(self.url, error)) from error
        self._writes = self.engine.execution_options(trimtab_writes=True)

    @property
    def shown(self) -> str:
        """The URL without its password; of SQLite, the file."""
        return self.url.database or "" if self.is_sqlite else self.url.render_as_string(hide_password=True)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one state of the database."""
        with self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that no other writer runs beside, in this process or another one."""
        with self._writes.connect() as connection, connection.begin():
            if not self.is_sqlite:
                connection.execute(LOCK, {"lock": ADVISORY_LOCK})
            yield connection

    def migrate(self, *, patience: float = 1.0) -> None:
        """Bring the tables to the version of this program. Servers that start together wait for each other. Waits so
        many seconds for a database that does not answer. Raises ConfigurationError."""
        self._prepare_file()
        try:
            _retried(lambda: self._alembic(command.upgrade, "head"), patience)
        except CommandError as error:
            raise ConfigurationError(
                f"the feedback database {self.shown} is not of this version of trimtab: {first_line(error)}"
            ) from error
        except SQLAlchemyError as error:
            reason = first_line(error.orig if isinstance(error, DBAPIError) and error.orig is not None else error)
            raise ConfigurationError(f"the feedback database {self.shown} cannot be used: {reason}") from error

    def downgrade(self, version: str = "base") -> None:
        """Bring the tables to an older version; `base` drops them."""
        self._alembic(command.downgrade, version)

    def forget(self) -> None:
        """Take what was deleted out of SQLite's log as well, unless somebody reads it now."""
        if self.is_sqlite:
            with self.engine.connect() as connection:
                connection.rollback()  # a checkpoint runs outside of transactions
                driver = connection.connection.driver_connection
                assert driver is not None
                driver.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        self.engine.dispose()

    def _alembic(self, change: Callable[[Config, str], None], version: str) -> None:
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        with self.writing() as connection:
            config.attributes["connection"] = connection
            change(config, version)

    def _prepare_file(self) -> None:
        """Create the file of SQLite, for its owner only: it will hold texts of people."""
        if not self.is_sqlite:
            return
        path = Path(self.shown)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise ConfigurationError(
                f"the feedback database {path} cannot be opened ({error.strerror}): choose a file that this user may "
                "write with --feedback-database"
            ) from error


def database_url(given: str) -> URL:
    """A URL of SQLAlchemy, with this program's driver; what has no scheme is a file of SQLite. Raises
    ConfigurationError."""
    if "://" not in given:
        return URL.create("sqlite", database=str(Path(given).expanduser()))
    try:
        url = make_url(re.sub(r"^postgres://", "postgresql://", given))
    except (ArgumentError, ValueError) as error:
        raise ConfigurationError("the URL of the feedback database is not valid") from error
    backend = url.get_backend_name()
    if backend not in ("sqlite", "postgresql"):
        raise ConfigurationError(f"the feedback database cannot be {backend}: use a file or a postgresql:// URL")
    if backend == "sqlite":
        if not url.database or url.database == ":memory:":
            raise ConfigurationError("the feedback database needs a file: write sqlite:///FILE, or the file alone")
        return url.set(drivername="sqlite")
    return url.set(drivername="postgresql+psycopg")


def _sqlite_engine(url: URL) -> Engine:
    engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS})

    def connected(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # sqlite3 begins no transactions of its own, which leave DDL out
        for pragma in (
            "journal_mode = WAL",
            "synchronous = FULL",  # a commit survives the loss of power too
            "foreign_keys = ON",
            "secure_delete = ON",  # what is deleted is overwritten
        ):
            connection.execute(f"PRAGMA {pragma}")

    def begun(connection: Connection) -> None:
        kind = "IMMEDIATE" if connection.get_execution_options().get("trimtab_writes") else "DEFERRED"
        connection.exec_driver_sql(f"BEGIN {kind}")

    event.listen(engine, "connect", connected)
    event.listen(engine, "begin", begun)
    return engine


def _postgres_engine(url: URL) -> Engine:
    arguments = {"connect_timeout": 10, "application_name": "trimtab"}
    return create_engine(url, pool_pre_ping=True, pool_size=4, connect_args={**arguments, **url.query})


def _needs(url: URL, error: Exception) -> str:
    if isinstance(error, ImportError):
        return "a PostgreSQL database of feedback needs psycopg: pip install 'trimtab[postgres]'"
    return f"the feedback database {url.render_as_string(hide_password=True)} cannot be used: {first_line(error)}"


def _retried(work: Callable[[], T], patience: float) -> T:
    last, pause = time.monotonic() + patience, 0.1
    while True:
        try:
            return work()
        except OperationalError:
            if time.monotonic() + pause > last:
                raise
            time.sleep(pause)
            pause = min(2 * pause, 2.0)
