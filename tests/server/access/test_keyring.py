"""The keys of a running server, and how it takes over changes of their file."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from server.access.keyring import SECONDS_BETWEEN_CHECKS, KeyRing
from server.access.keys import KeyFileError, add_key, revoke_key


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now

    def pass_a_check(self) -> None:
        self.now += SECONDS_BETWEEN_CHECKS


def found(ring: KeyRing, secret: str) -> str | None:
    key = ring.find(secret.encode())
    return None if key is None else key.name


def test_a_key_of_the_settings_and_keys_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("plain\n")
    ring = KeyRing(path, "own")
    assert ring.is_required
    assert [found(ring, secret) for secret in ("own", "plain", "", "plai", "plain ")] == [
        "settings",
        "line-1",
        *[None] * 3,
    ]


def test_without_either_no_key_is_required() -> None:
    ring = KeyRing(None, None)
    assert not ring.is_required
    assert found(ring, "") is None


def test_a_file_without_keys_is_refused_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    with pytest.raises(KeyFileError, match="cannot be read"):
        KeyRing(path, "own")
    path.write_text("\n# nothing\n")
    with pytest.raises(KeyFileError, match="holds no key: add one with `trimtab keys add NAME`"):
        KeyRing(path, None)
    assert found(KeyRing(path, "own"), "own") == "settings"


def test_added_and_revoked_keys_are_noticed(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys", Clock()
    first, _ = add_key(path, "first")
    ring = KeyRing(path, None, clock=clock)
    second, _ = add_key(path, "second")
    assert (found(ring, first), found(ring, second)) == ("first", None)  # before the next look at the file
    clock.pass_a_check()
    assert (found(ring, first), found(ring, second)) == ("first", "second")
    revoke_key(path, "first")
    clock.pass_a_check()
    assert (found(ring, first), found(ring, second)) == (None, "second")
    revoke_key(path, "second")
    clock.pass_a_check()
    assert (found(ring, first), found(ring, second)) == (None, None)
    assert ring.is_required  # a file without keys opens nothing


def test_a_broken_file_keeps_the_keys_and_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, clock = tmp_path / "keys", Clock()
    secret, _ = add_key(path, "a")
    ring = KeyRing(path, None, clock=clock)
    caplog.set_level(logging.INFO)
    whole = path.read_bytes()
    path.write_bytes(whole[:40])
    for _ in range(3):
        clock.pass_a_check()
        assert found(ring, secret) == "a"
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert record.getMessage().endswith("; the keys read before stay valid")
    path.unlink()
    for _ in range(3):
        clock.pass_a_check()
        assert found(ring, secret) == "a"
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    path.write_text("other\n")
    clock.pass_a_check()
    assert (found(ring, secret), found(ring, "other")) == (None, "line-1")
