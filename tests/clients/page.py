"""The examples of docs/clients.md, which the tests run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
ADDRESS = "http://127.0.0.1:8000"


def example(language: str, word: str, url: str) -> str:
    """The one block of that language in which a word occurs, for a server at `url`."""
    found = [text for kind, text in BLOCKS if kind == language and word in text]
    assert len(found) == 1, word
    return found[0].replace(ADDRESS, url)
