"""The key file, and the commands that change it."""

from __future__ import annotations

import hashlib
import json
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server import cli
from server.access.keys import Key, KeyFileError, add_key, digest_of, read_keys, revoke_key


def names(path: Path) -> list[str]:
    return [key.name for key in read_keys(path)]


def test_plain_keys_one_a_line(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# of the team\nfirst\n\n second \nfirst\n")
    assert read_keys(path) == [Key.plain("line-2", "first"), Key.plain("line-4", "second")]
    assert [key.scopes for key in read_keys(path)] == [["generate"]] * 2


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(b"\xef\xbb\xbffirst\r\nsecond\r\n")
    assert [key.sha256 for key in read_keys(path)] == [hashlib.sha256(one).hexdigest() for one in (b"first", b"second")]


def test_an_added_key_is_stored_as_a_digest_that_only_the_owner_can_read(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    secret, key = add_key(path, "team", ["admin", "generate", "admin"], tokens_per_minute=100)
    assert read_keys(path) == [key]
    assert key.sha256 == digest_of(secret.encode())
    assert (key.scopes, key.tokens_per_minute, key.requests_per_minute) == (["admin", "generate"], 100, None)
    assert secret not in path.read_text()
    assert len(secret) == len("trimtab_") + 43  # 32 bytes in base64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_changed_file_keeps_its_other_lines(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(b"\xef\xbb\xbf# of the team\nplain\n")
    path.chmod(0o644)
    add_key(path, "a")
    add_key(path, "b")
    assert names(path) == ["line-2", "a", "b"]
    revoke_key(path, "a")
    assert names(path) == ["line-2", "b"]
    revoke_key(path, "line-2")
    assert names(path) == ["b"]
    assert path.read_text().splitlines()[0] == "# of the team"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    revoke_key(path, "b")
    assert names(path) == []


def test_changes_through_a_link_change_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("plain\n")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "keys")
    add_key(link, "a")
    assert link.is_symlink()
    assert names(tmp_path / "keys") == ["line-1", "a"]


def test_changes_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    wanted = [f"key{index}" for index in range(16)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: add_key(path, name), wanted))
    assert sorted(names(path)) == sorted(wanted)
    assert {one.name for one in tmp_path.iterdir()} <= {"keys", ".keys.lock"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"name": "a"}', "line 2: sha256: Field required"),
        ('{"name": "a", "sha256": "00"}', "line 2: sha256: "),
        ('{"name": "a b", "sha256": "%s"}' % ("0" * 64), "line 2: name: "),
        ('{"name": "a", "sha256": "%s", "scopes": ["root"]}' % ("0" * 64), "line 2: scopes.0: "),
        ('{"name": "a", "sha256": "%s", "scopes": []}' % ("0" * 64), "line 2: scopes: "),
        ('{"name": "a", "sha256": "%s", "tokens_per_minute": 0}' % ("0" * 64), "line 2: tokens_per_minute: "),
        ('{"name": "a", "sha256": "%s", "expires": "never"}' % ("0" * 64), "line 2: expires: "),
        ('{"name": "a", "sha256": "%s", "speaks_for": ["twice"]}' % ("0" * 64), "line 2: speaks_for: it is for keys "),
        (
            '{"name": "a", "sha256": "%s", "scopes": ["feedback"], "speaks_for": ["line-3"]}' % ("0" * 64),
            "line 2: speaks_for: line-3 is the name of a line, which changes: ",
        ),
        ('{"name": "a", "sha2', "line 2: "),
        ('{"name": "twice", "sha256": "%s"}' % ("0" * 64), "line 2: the key 'twice' stands there twice"),
        ('{"name": "other", "sha256": "%s"}' % ("1" * 64), "line 2: the key 'other' stands there twice"),
    ],
)
def test_a_wrong_line_is_named_without_what_it_holds(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "keys"
    path.write_text(f'{{"name": "twice", "sha256": "{"1" * 64}"}}\n{line}\n')
    with pytest.raises(KeyFileError) as failure:
        read_keys(path)
    assert failure.value.message.startswith(f"the API key file {path}, {reason}")
    assert "0" * 64 not in failure.value.message


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(KeyFileError, match="cannot be read"):
            read_keys(path)
    (tmp_path / "utf16").write_text("first\n", encoding="utf-16")
    with pytest.raises(KeyFileError, match="it is not UTF-8 text"):
        read_keys(tmp_path / "utf16")
    (tmp_path / "large").write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(KeyFileError, match="is larger than 1048576 bytes"):
        read_keys(tmp_path / "large")


def test_what_cannot_be_changed_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    add_key(path, "a")
    before = path.read_bytes()
    with pytest.raises(KeyFileError, match="the key 'a' exists already"):
        add_key(path, "a")
    with pytest.raises(KeyFileError, match="there is no key 'b'"):
        revoke_key(path, "b")
    with pytest.raises(KeyFileError, match="name is not valid"):
        add_key(path, "no name")
    assert path.read_bytes() == before
    with pytest.raises(KeyFileError, match="cannot be written"):
        add_key(path / "keys", "a")


def test_a_key_speaks_for_keys_that_are_there(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    add_key(path, "app")
    _, key = add_key(path, "judge", ["feedback"], speaks_for=["app", "settings", "app"])
    assert read_keys(path)[1] == key
    assert key.speaks_for == ["app", "settings"]
    with pytest.raises(KeyFileError, match=r"there is no key 'web' in .* to speak for: add that one first"):
        add_key(path, "other", ["feedback"], speaks_for=["web"])
    with pytest.raises(KeyFileError, match="speaks_for is not valid: it is for keys with the scope feedback"):
        add_key(path, "other", ["generate"], speaks_for=["app"])
    assert names(path) == ["app", "judge"]


def run(*words: str, path: Path) -> tuple[str, str]:
    result = CliRunner().invoke(cli.app, ["keys", *words], env={"TRIMTAB_API_KEY_FILE": str(path)})
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def test_the_commands(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    printed, told = run(
        "add", "team", "--scope", "generate", "--scope", "admin", "--requests-per-minute", "9", path=path
    )
    assert digest_of(printed.strip().encode()) == read_keys(path)[0].sha256
    assert "shown only this once" in told
    added = json.loads(run("add", "other", "--json", path=path)[0])
    assert digest_of(added.pop("key").encode()) == read_keys(path)[1].sha256
    created = read_keys(path)[1].created
    assert added == {"name": "other", "scopes": ["generate"], "created": created}
    first, second = run("list", path=path)[0].splitlines()
    assert first == f"team  generate,admin  {read_keys(path)[0].created}  requests-per-minute 9"
    assert second == f"other  generate  {created}"
    listed = json.loads(run("list", "--json", path=path)[0])
    assert [one["name"] for one in listed] == ["team", "other"]
    assert {name for one in listed for name in one} == {"name", "scopes", "created", "requests_per_minute"}
    run("add", "judge", "--scope", "feedback", "--speaks-for", "team", "--speaks-for", "other", path=path)
    assert run("list", path=path)[0].splitlines()[2].endswith("  speaks-for team,other")
    assert run("revoke", "judge", path=path) == ("", "the key judge was revoked\n")
    assert json.loads(run("revoke", "team", "--json", path=path)[0]) == {"name": "team", "revoked": True}
    assert run("revoke", "other", path=path) == ("", "the key other was revoked\n")
    assert names(path) == []


def test_a_plain_key_is_listed_as_such(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("secret\n")
    assert run("list", path=path)[0] == "line-1  generate  in plain text\n"


def test_the_commands_need_a_file() -> None:
    result = CliRunner().invoke(cli.app, ["keys", "list"], env={"TRIMTAB_API_KEY_FILE": ""})
    assert result.exit_code == 2
    assert "--api-key-file" in result.output
