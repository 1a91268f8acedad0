"""Files of rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.preference_rows import Rows, Write


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows, text or bytes to a file and return its path."""

    def write(content: Rows | str | bytes, name: str = "data.jsonl") -> str:
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write
