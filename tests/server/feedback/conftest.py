"""Both databases: each test that takes `url` or `database` runs on SQLite and on PostgreSQL."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from server.feedback import tables
from server.feedback.database import Database
from tests.support.postgres import Cluster, binaries, postgres_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    found = binaries()
    if found is None:
        pytest.skip("PostgreSQL's initdb is not installed: apt-get install postgresql")
    with postgres_cluster(found) as made:
        yield made


@pytest.fixture(params=["sqlite", "postgresql"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def url(backend: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new, empty database."""
    if backend == "sqlite":
        return str(tmp_path / "feedback.db")
    made: Cluster = request.getfixturevalue("cluster")
    return made.new_database()


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("migrated") / "feedback.db"
    made = Database(str(file))
    made.migrate()
    made.close()
    return file


@pytest.fixture(scope="session")
def migrated_url(cluster: Cluster) -> str:
    made = Database(cluster.new_database())
    made.migrate()
    made.close()
    return address(made)


@pytest.fixture
def database(backend: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A database with its tables, which are empty. Migrations take longer than most tests, so they run once."""
    if backend == "sqlite":
        made = Database(str(shutil.copy(request.getfixturevalue("migrated_file"), tmp_path / "database.db")))
    else:
        made = Database(request.getfixturevalue("migrated_url"))
        with made.writing() as connection:
            connection.execute(text(f"TRUNCATE {', '.join(tables.metadata.tables)} RESTART IDENTITY"))
    yield made
    made.close()


def address(database: Database) -> str:
    """What the commands call it."""
    return database.url.render_as_string(hide_password=False)
