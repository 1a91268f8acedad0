"""The audit log: whole lines, in order, also after a writer was killed or the disk was full."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.profiles.audit import AuditLog
from tests.support.full_disk import full_disk


def entry(number: int, profile: str = "warm") -> dict[str, object]:
    return {"action": "upload", "profile": profile, "number": number}


def test_the_newest_come_first_of_one_profile_or_all(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    assert log.read(10) == []
    for number in range(6):
        log.append(entry(number, "warm" if number % 2 else "cold"))
    assert [one["number"] for one in log.read(3)] == [5, 4, 3]
    assert [one["number"] for one in log.read(10, "cold")] == [4, 2, 0]


def test_a_line_without_an_end_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append(entry(0))
    path.write_bytes(path.read_bytes() + b'{"action": "upl')  # the writer was killed
    log.append(entry(1))
    assert [one["number"] for one in log.read(10)] == [1, 0]


def test_text_of_a_client_stays_in_its_line(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    log.append({"action": "upload", "key": 'a\n{"action": "forged"}\u2028', "profile": None})
    assert (tmp_path / "audit.jsonl").read_bytes().count(b"\n") == 1
    assert log.read(10) == [{"action": "upload", "key": 'a\n{"action": "forged"}\u2028'}]


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append(entry(0))
    before = path.read_bytes()
    for left in (0, 1, 20):
        with full_disk(len(before) + left), pytest.raises(OSError, match=r"File too large|No space left"):
            log.append(entry(1))
        assert path.read_bytes() == before
