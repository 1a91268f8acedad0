"""schemathesis on the OpenAPI document: no 5xx, and nothing that the document does not allow for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients import schemathesis_cli
from tests.clients.process import serving

SAME_EACH_TIME = ("--seed", "1", "--generation-deterministic", "--max-examples", "30")


@pytest.fixture(scope="module")
def small(profiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(profiles, tmp_path_factory.mktemp("small") / "log", *schemathesis_cli.SMALL) as url:
        yield url


@pytest.mark.timeout(900)
def test_the_document_is_kept(small: str, tmp_path: Path) -> None:
    done = schemathesis_cli.run(small, tmp_path, *SAME_EACH_TIME)
    assert done.returncode == 0, done.stdout + done.stderr
