"""schemathesis on the OpenAPI document: no 5xx, and nothing that the document does not allow for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.process import serving

HERE = Path(__file__).parent
SMALL = ("--context", "64", "--slots", "4", "--max-queue", "8")  # bounds what one made-up request can ask for


@pytest.fixture(scope="module")
def small(profiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(profiles, tmp_path_factory.mktemp("small") / "log", *SMALL) as url:
        yield url


@pytest.mark.timeout(900)
def test_the_document_is_kept(small: str, tmp_path: Path) -> None:
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        "--config-file",
        str(HERE / "schemathesis.toml"),
        "run",
        f"{small}/openapi.json",
    ]
    environment = {**os.environ, "SCHEMATHESIS_HOOK_FILE": str(HERE / "known_names.py")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
