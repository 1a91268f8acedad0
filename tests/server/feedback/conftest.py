"""Both databases: each test that takes `url` runs on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

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
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new, empty database."""
    if request.param == "sqlite":
        return str(tmp_path / "feedback.db")
    made: Cluster = request.getfixturevalue("cluster")
    return made.new_database()


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    """A new database with its tables."""
    made = Database(url)
    made.migrate()
    yield made
    made.close()
