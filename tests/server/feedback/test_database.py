"""URLs, migrations and transactions, on both databases."""

from __future__ import annotations

import stat
import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, select, text

from benchmarks.common.forked import forked
from server.feedback import tables
from server.feedback.database import Database, database_url
from server.settings import ConfigurationError

pytestmark = pytest.mark.slow

NAMES = {"alembic_version", *tables.metadata.tables}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a/feedback.db", "sqlite:///a/feedback.db"),
        ("sqlite:////var/feedback.db", "sqlite:////var/feedback.db"),
        ("sqlite+aiosqlite:///feedback.db", "sqlite:///feedback.db"),
        ("postgres://me@host/name", "postgresql+psycopg://me@host/name"),
        ("postgresql+asyncpg://me@host/name", "postgresql+psycopg://me@host/name"),
    ],
)
def test_a_file_or_a_url_names_a_database(given: str, expected: str) -> None:
    assert str(database_url(given)) == expected


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("mysql://host/name", "the feedback database cannot be mysql: use a file or a postgresql:// URL"),
        ("sqlite://", "the feedback database needs a file: write sqlite:///FILE, or the file alone"),
        ("://", "the URL of the feedback database is not valid"),
    ],
)
def test_other_databases_are_refused(given: str, problem: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        database_url(given)
    assert raised.value.message == problem


def test_the_password_is_not_shown() -> None:
    assert "secret" not in Database("postgresql://me:secret@host/name").shown


def test_migrations_make_the_tables_and_take_them_away(url: str) -> None:
    database = Database(url)
    database.migrate()
    database.migrate()
    with database.reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection), tables.metadata) == []
        assert set(inspect(connection).get_table_names()) == NAMES
    database.downgrade()
    with database.reading() as connection:
        assert inspect(connection).get_table_names() == ["alembic_version"]
    database.migrate()
    with database.reading() as connection:
        assert set(inspect(connection).get_table_names()) == NAMES
    database.close()


def migrate(url: str) -> None:
    Database(url).migrate(patience=30)


def test_servers_that_start_together_migrate_once(url: str) -> None:
    started = [forked(migrate, url) for _ in range(4)]
    for process in started:
        process.join(100)
    assert [process.exitcode for process in started] == [0] * 4
    database = Database(url)
    with database.reading() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).all() == [("0002",)]
    database.close()


def test_a_database_of_a_newer_version_is_refused(url: str) -> None:
    database = Database(url)
    database.migrate()
    with database.writing() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConfigurationError, match="is not of this version of trimtab: Can't locate revision"):
        database.migrate()
    database.close()


def test_writers_take_turns(database: Database) -> None:
    """Each reads and adds one in its transaction: without turns, some would read the same number."""

    def add() -> None:
        for _ in range(20):
            with database.writing() as connection:
                found = connection.execute(select(tables.deleted_users.c.deleted)).scalar_one()
                connection.execute(tables.deleted_users.update().values(deleted=found + 1))

    with database.writing() as connection:
        connection.execute(tables.deleted_users.insert(), {"digest": "a", "deleted": 0})
    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.reading() as connection:
        assert connection.execute(select(tables.deleted_users.c.deleted)).scalar_one() == 80


def test_a_file_is_for_its_owner_only_and_in_wal_mode(tmp_path: Path) -> None:
    path = tmp_path / "new" / "feedback.db"
    database = Database(str(path))
    database.migrate()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with database.reading() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar_one() == "wal"
        assert connection.execute(text("PRAGMA synchronous")).scalar_one() == 2
        assert connection.execute(text("PRAGMA secure_delete")).scalar_one() == 1
    database.close()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "feedback.db"
    with pytest.raises(ConfigurationError, match=r"cannot be opened \(File exists\): choose a file"):
        Database(str(path)).migrate()


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("these are notes\n" * 100)
    with pytest.raises(ConfigurationError, match="cannot be used: file is not a database"):
        Database(str(path)).migrate()


def test_a_server_that_does_not_answer_is_named_without_its_password(tmp_path: Path) -> None:
    url = f"postgresql://me:secret@/name?host={tmp_path}"
    with pytest.raises(ConfigurationError, match="cannot be used") as raised:
        Database(url).migrate(patience=0)
    assert "secret" not in raised.value.message
