"""Every fault on the page about reliability names tests that exist, and the page says how many there are."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
HEADINGS = ("| Fault | Promise | Test |", "| Event | Promise | Test |")


def rows() -> list[list[str]]:
    """The cells of each fault."""
    found, inside = [], False
    for line in PAGE.splitlines():
        inside = line in HEADINGS or (inside and line.startswith("|"))
        if inside and line not in HEADINGS and not line.startswith("|---"):
            found.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


def test_every_fault_has_a_promise_and_a_test_that_exists() -> None:
    defined = {
        (path.name, name)
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    for row in rows():
        assert len(row) == 3, row
        file = ""
        for test in re.findall(r"`([^`]+)`", row[2]):
            file, name = test.split("::") if "::" in test else (file, test)
            assert (file, name) in defined, row
        assert file or row[2] == "the same", row


def test_the_page_counts_its_faults() -> None:
    (count,) = re.findall(r": (\d+) faults, each with the test that injects it", PAGE)
    assert int(count) == len(rows()) >= 40
    assert len({row[0] for row in rows()}) == len(rows())
