"""Profiles are changed over HTTP on a live server: uploads, versions, aliases, the audit log, and what is refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from server.access.keys import add_key
from server.api.document import FILE
from server.engines.torch.engine import TorchEngine
from server.profiles.versions import ProfileStore
from steering_vectors.profiles.files import MAX_FILE_BYTES, load_profile, save_profile
from tests.server.access.test_gate import bearer, first_id
from tests.server.api.test_document import CHANGES, DOCUMENT, check_answer
from tests.server.http.test_error_responses import error_of
from tests.support.full_disk import full_disk
from tests.support.running import HeldEngine
from tests.support.serving import engine_fixture, live_server, random_profile, until

pytestmark = pytest.mark.slow

engine = engine_fixture(slots=4, context=128, max_queue=8)
SHORT = {"prompt": "Bread is", "max_tokens": 1}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "profiles"


@pytest.fixture
def client(engine: TorchEngine, directory: Path) -> Iterator[httpx.Client]:
    with live_server(engine, directory) as client:
        yield client


@pytest.fixture(scope="module")
def files(engine: TorchEngine, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Eight files of a profile `warm`."""
    folder = tmp_path_factory.mktemp("files")
    profiles = [random_profile(engine.info.identity, "warm", seed=seed, unit=0.01) for seed in range(8)]
    return [save_profile(profile, folder).read_bytes() for profile in profiles]


def version_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def put(client: httpx.Client, data: Any, name: str = "warm", **headers: str) -> httpx.Response:
    given = {header.replace("_", "-"): value for header, value in headers.items()}
    return client.put(f"/profiles/{name}", content=data, headers=given)


def used(client: httpx.Client, reference: str, **fields: Any) -> str:
    """The version that the receipt of a request names."""
    answer = client.post("/generate", json={**SHORT, "profile": reference, **fields})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["steering"][0]["version"])


def tree(directory: Path) -> dict[str, bytes]:
    """All files that hold profiles or what is known of them."""
    left_out = {"lock", "audit.jsonl"}
    paths = [path for path in directory.rglob("*") if path.is_file() and path.name not in left_out]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def changes(client: httpx.Client, **parameters: Any) -> list[dict[str, Any]]:
    return list(client.get("/audit", params=parameters).json()["changes"])


def test_an_upload_is_served_and_has_an_etag(client: httpx.Client, files: list[bytes], directory: Path) -> None:
    first, second = map(version_of, files[:2])
    answer = put(client, files[0], if_none_match="*")
    assert answer.status_code == 201
    assert check_answer(answer, "/profiles/{name}", "put")["version"] == first
    assert answer.headers["etag"] == client.get("/profiles/warm").headers["etag"] == f'"{first}"'
    again = put(client, files[1], if_match=f'"{first}"')
    assert (again.status_code, again.json()["version"]) == (200, second)
    assert load_profile(directory / "warm.safetensors").version == second == used(client, "warm")
    same = put(client, files[1])
    assert (same.status_code, same.headers["etag"]) == (200, f'"{second}"')
    assert [one["action"] for one in changes(client)] == ["upload", "upload"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"if_match": '"{current}"'}, 200),
        ({"if_match": "{current}"}, 200),
        ({"if_match": '"{short}"'}, 200),
        ({"if_match": '"00000000", "{current}"'}, 200),
        ({"if_match": "*"}, 200),
        ({"if_none_match": '"00000000"'}, 200),
        ({"if_match": '"00000000"'}, 412),
        ({"if_match": 'W/"{current}"'}, 412),
        ({"if_match": '""'}, 412),
        ({"if_none_match": "*"}, 412),
        ({"if_none_match": '"{current}"'}, 412),
        ({"if_match": "nothing"}, 400),
        ({"if_match": ""}, 400),
        ({"if_none_match": '"a'}, 400),
    ],
)
def test_conditions_are_kept(
    client: httpx.Client, files: list[bytes], directory: Path, headers: dict[str, str], status: int
) -> None:
    put(client, files[0])
    before = tree(directory)
    current = version_of(files[0])
    given = {name: value.format(current=current, short=current[:8]) for name, value in headers.items()}
    answer = put(client, files[1], **given)
    assert answer.status_code == status, answer.text
    if status != 200:
        assert tree(directory) == before
        assert error_of(answer, status)["param"] in ("if-match", "if-none-match")
    assert (status == 200) is (used(client, "warm") == version_of(files[1]))


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("DELETE", "/profiles/warm/versions/{old}", None),
        ("PUT", "/profiles/warm/aliases/canary", {"share": 0.5}),
        ("PUT", "/profiles/warm/aliases/new", {}),
        ("DELETE", "/profiles/warm/aliases/canary", None),
    ],
)
def test_versions_and_aliases_keep_conditions_on_the_current_version(
    client: httpx.Client, files: list[bytes], directory: Path, method: str, path: str, body: dict[str, Any] | None
) -> None:
    for data in files[:2]:
        put(client, data)
    old, current = (version_of(data) for data in files[:2])
    assert client.put("/profiles/warm/aliases/canary", json={}).status_code == 200
    before = tree(directory)
    for headers in ({"if-match": f'"{old}"'}, {"if-none-match": "*"}):
        answer = client.request(method, path.format(old=old), json=body, headers=headers)
        assert error_of(answer, 412)["param"] == next(iter(headers))
    assert tree(directory) == before
    answer = client.request(method, path.format(old=old), json=body, headers={"if-match": f'"{current[:8]}"'})
    assert answer.status_code == 200, answer.text
    assert tree(directory) != before


def test_a_condition_on_what_is_not_there(client: httpx.Client, files: list[bytes]) -> None:
    error = error_of(put(client, files[0], if_match="*"), 412)
    assert error["message"].startswith("profile 'warm' does not exist")
    assert error_of(client.delete("/profiles/warm", headers={"if-match": "*"}), 412)["code"] == "precondition_failed"
    assert error_of(client.delete("/profiles/warm"), 404)["code"] == "profile_not_found"


def test_every_version_is_listed_and_used_by_its_hash(client: httpx.Client, files: list[bytes]) -> None:
    for data in files[:3]:
        put(client, data)
    listed = check_answer(client.get("/profiles/warm/versions"), "/profiles/{name}/versions", "get")["versions"]
    assert [one["version"] for one in listed] == [version_of(data) for data in reversed(files[:3])]
    assert [one["current"] for one in listed] == [True, False, False]
    assert {one["published_by"] for one in listed} == {"127.0.0.1"}
    for data in files[:3]:
        assert used(client, f"warm#{version_of(data)[:8]}") == version_of(data)
        chat = {"model": f"demo:warm#{version_of(data)[:8]}@0.5", "prompt": "Bread", "max_tokens": 1}
        assert client.post("/v1/completions", json=chat).json()["steering"][0]["version"] == version_of(data)
        download = client.get("/profiles/warm/file", params={"version": version_of(data)[:8]})
        assert (download.content, download.headers["etag"]) == (data, f'"{version_of(data)}"')
    assert client.get("/profiles/warm/file").content == files[2]
    resolved = client.post("/steering/resolve", json={"steering": f"warm#{version_of(files[0])[:8]}"}).json()
    assert resolved["steering"][0]["version"] == version_of(files[0])
    assert client.post("/generate", json={**SHORT, "profile": "warm#00000000"}).status_code == 404


def test_rollback_goes_back_and_forth_and_to_a_version(client: httpx.Client, files: list[bytes]) -> None:
    versions = [version_of(data) for data in files[:3]]
    assert error_of(client.post("/profiles/warm/rollback", json={}), 404)["message"] == (
        "no earlier version of profile 'warm' is kept"
    )
    for data in files[:3]:
        put(client, data)
    for expected in (versions[1], versions[2]):
        answer = client.post("/profiles/warm/rollback", json={})
        assert check_answer(answer, "/profiles/{name}/rollback")["version"] == expected
    assert client.post("/profiles/warm/rollback", json={"version": versions[0][:8]}).status_code == 200
    assert used(client, "warm") == versions[0]
    error_of(client.post("/profiles/warm/rollback", json={}, headers={"if-match": f'"{versions[1]}"'}), 412)
    for version in ("00000000", "xyz", ""):
        assert client.post("/profiles/warm/rollback", json={"version": version}).status_code in (400, 404)
    for content, kind in (("", ""), ("", "text/plain"), ("{}", "text/plain")):  # what any web page could send
        answer = client.post("/profiles/warm/rollback", content=content, headers={"content-type": kind})
        assert answer.status_code == 400
    assert used(client, "warm") == versions[0]


def test_a_deleted_profile_is_gone_and_can_be_rolled_back(client: httpx.Client, files: list[bytes]) -> None:
    put(client, files[0])
    put(client, files[1])
    error_of(client.delete("/profiles/warm", headers={"if-match": f'"{version_of(files[0])}"'}), 412)
    answer = client.delete("/profiles/warm", headers={"if-match": f'"{version_of(files[1])}"'})
    assert check_answer(answer, "/profiles/{name}", "delete") == {
        "name": "warm",
        "version": version_of(files[1]),
        "served": None,
    }
    for reference in ("warm", f"warm#{version_of(files[1])[:8]}"):
        assert client.post("/generate", json={**SHORT, "profile": reference}).status_code == 404
    assert [one["current"] for one in client.get("/profiles/warm/versions").json()["versions"]] == [False, False]
    assert client.post("/profiles/warm/rollback", json={}).json()["version"] == version_of(files[1])
    assert used(client, "warm") == version_of(files[1])


def test_a_shipped_profile_is_shadowed_and_comes_back(
    engine: TorchEngine, files: list[bytes], directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "warm.safetensors").write_bytes(files[0])
    monkeypatch.setattr("server.state.shipped_profiles", lambda identity: {"warm": tmp_path / "warm.safetensors"})
    shipped, own = map(version_of, files[:2])
    with live_server(engine, directory) as client:
        error = error_of(client.delete("/profiles/warm"), 409)
        assert error["message"] == (
            "profile 'warm' comes with trimtab and has no file that could be deleted: upload one of its name to "
            "replace it"
        )
        error_of(put(client, files[1], if_none_match="*"), 412)
        assert put(client, files[1], if_match=f'"{shipped}"').status_code == 200
        assert (used(client, "warm"), used(client, f"warm#{shipped[:8]}")) == (own, shipped)
        assert client.delete("/profiles/warm").json()["served"] == shipped
        assert used(client, "warm") == shipped
        put(client, files[1])
        assert client.post("/profiles/warm/rollback", json={"version": shipped[:8]}).json()["version"] == shipped
        assert [one["shipped"] for one in client.get("/profiles/warm/versions").json()["versions"]] == [True, False]


def test_a_version_with_an_alias_or_in_use_is_pinned(engine: HeldEngine, files: list[bytes], directory: Path) -> None:
    versions = [version_of(data) for data in files]
    with live_server(engine, directory, profile_versions=1) as client:
        for data in files[:2]:
            put(client, data)
        assert client.put("/profiles/warm/aliases/stable", json={"version": versions[0][:8]}).status_code == 200
        engine.hold(after=1)
        body = {**SHORT, "max_tokens": 20, "ignore_eos": True, "stream": True, "profile": f"warm#{versions[1][:8]}"}
        with client.stream("POST", "/generate", json=body) as response:
            lines = response.iter_lines()
            id = first_id(lines)
            engine.until_held()
            for data in files[2:5]:
                put(client, data)
            listed = {one["version"]: one for one in client.get("/profiles/warm/versions").json()["versions"]}
            assert list(listed) == [versions[4], versions[3], versions[1], versions[0]]
            assert (listed[versions[1]]["in_use"], listed[versions[0]]["aliases"]) == (1, ["stable"])
            assert "in use" in error_of(client.delete(f"/profiles/warm/versions/{versions[1]}"), 409)["message"]
            assert "alias" in error_of(client.delete(f"/profiles/warm/versions/{versions[0]}"), 409)["message"]
            assert "current" in error_of(client.delete(f"/profiles/warm/versions/{versions[4]}"), 409)["message"]
            engine.go()
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["steering"][0]["version"] == versions[1]
        assert id
        until(lambda: client.get("/profiles/warm/versions").json()["versions"][2]["in_use"] == 0)
        answer = client.delete(f"/profiles/warm/versions/{versions[1][:8]}")
        assert check_answer(answer, "/profiles/{name}/versions/{version}", "delete")["version"] == versions[1]
        put(client, files[5])
        kept = [one["version"] for one in client.get("/profiles/warm/versions").json()["versions"]]
        assert kept == [versions[5], versions[4], versions[0]]


def test_stable_is_what_a_plain_name_means(client: httpx.Client, files: list[bytes]) -> None:
    old, new = map(version_of, files[:2])
    put(client, files[0])
    made = check_answer(client.put("/profiles/warm/aliases/stable", json={}), "/profiles/{name}/aliases/{alias}", "put")
    assert made == {"name": "warm", "alias": "stable", "version": old, "share": 0.0}
    put(client, files[1])
    references = ("warm", "warm#stable", "warm#latest")
    assert [used(client, reference) for reference in references] == [old, old, new]
    model = {"model": "demo:warm#latest@0.5", "prompt": "Bread", "max_tokens": 1}
    assert client.post("/v1/completions", json=model).json()["steering"][0]["version"] == new
    assert check_answer(client.get("/profiles"), "/profiles", "get")["profiles"][0]["aliases"] == {
        "stable": {"version": old, "share": 0.0}
    }
    check_answer(client.delete("/profiles/warm/aliases/stable"), "/profiles/{name}/aliases/{alias}", "delete")
    assert used(client, "warm") == new
    error = error_of(client.post("/generate", json={**SHORT, "profile": "warm#stable"}), 404)
    assert error["message"] == "profile 'warm' has no alias 'stable'; it has: none"
    assert error_of(client.delete("/profiles/warm/aliases/stable"), 404)["code"] == "profile_not_found"


def test_a_canary_gets_its_share_and_a_user_stays(
    engine: TorchEngine, client: httpx.Client, files: list[bytes], directory: Path
) -> None:
    old, new = map(version_of, files[:2])
    put(client, files[0])
    client.put("/profiles/warm/aliases/stable", json={})
    put(client, files[1])
    assert client.put("/profiles/warm/aliases/canary", json={"share": 0.25}).status_code == 200
    by_user = {user: used(client, "warm", user=f"user {user}") for user in range(60)}
    assert set(by_user.values()) == {old, new}
    assert list(by_user.values()).count(new) < 30
    first_users = {user: by_user[user] for user in range(20)}
    assert {user: used(client, "warm", user=f"user {user}") for user in range(20)} == first_users
    with live_server(engine, directory) as other:  # also a server that was started later
        assert {user: used(other, "warm", user=f"user {user}") for user in range(20)} == dict(
            list(by_user.items())[:20]
        )
        body = {"model": "demo:warm", "prompt": "Bread", "max_tokens": 1}
        for user in range(5):
            answer = other.post("/v1/completions", json={**body, "user": f"user {user}"}).json()
            assert answer["steering"][0]["version"] == by_user[user]
        assert client.put("/profiles/warm/aliases/canary", json={"version": new, "share": 1}).status_code == 200
        until(lambda: {used(other, "warm") for _ in range(4)} == {new})  # the other server sees the change
    assert {used(client, "warm") for _ in range(8)} == {new}
    assert used(client, "warm#stable") == old


def test_a_change_of_a_running_generation_keeps_its_version(
    engine: HeldEngine, client: httpx.Client, files: list[bytes]
) -> None:
    old, new = map(version_of, files[:2])
    put(client, files[0])
    client.put("/profiles/warm/aliases/stable", json={})
    put(client, files[1])
    for share, expected in ((1.0, new), (0.0, old)):
        client.put("/profiles/warm/aliases/canary", json={"share": share})
        engine.hold(after=1, until_change=True)
        body = {**SHORT, "max_tokens": 8, "ignore_eos": True, "stream": True, "profile": "warm"}
        with client.stream("POST", "/generate", json=body) as response:
            lines = response.iter_lines()
            id = first_id(lines)
            engine.until_held()
            client.put("/profiles/warm/aliases/canary", json={"share": 0.5})
            changed = client.patch(f"/generations/{id}", json={"steering": "warm@0.5"})
            assert changed.json()["steering"][0]["version"] == expected
            assert [line for line in lines if line]


@pytest.mark.parametrize(
    ("alias", "body", "status"),
    [
        ("latest", {}, 400),
        ("deadbeef", {}, 400),
        ("UP", {}, 400),
        ("%C3%BC", {}, 400),
        ("a%0A", {}, 400),
        ("canary", {"share": 1.5}, 400),
        ("canary", {"share": -0.1}, 400),
        ("canary", {"share": "0.1"}, 400),
        ("canary", {"share": 0.6}, 400),  # beside 0.5 of another
        ("canary", {"version": "00000000"}, 404),
        ("canary", {"version": "none"}, 404),
        ("canary", {"versions": "x"}, 400),
    ],
)
def test_an_alias_that_cannot_be_is_refused(
    client: httpx.Client, files: list[bytes], directory: Path, alias: str, body: dict[str, Any], status: int
) -> None:
    put(client, files[0])
    client.put("/profiles/warm/aliases/other", json={"share": 0.5})
    before = tree(directory)
    error_of(client.put(f"/profiles/warm/aliases/{alias}", json=body), status)
    assert tree(directory) == before
    assert client.put("/profiles/cold/aliases/stable", json={}).status_code == 404


def bad_files(engine: TorchEngine, files: list[bytes], folder: Path) -> dict[str, bytes]:
    identity = engine.info.identity
    whole = files[0]
    zero = random_profile(identity, "warm")
    zero = type(zero)(name="warm", model=identity, method="random", directions={1: torch.zeros(identity.hidden_size)})
    other = type(identity)("other", identity.architecture, identity.hidden_size, identity.num_layers, "0" * 64)
    smaller = type(identity)("small", identity.architecture, 8, identity.num_layers, identity.fingerprint)
    length = int.from_bytes(whole[:8], "little")
    nan = whole[: 8 + length] + b"\xff" * (len(whole) - 8 - length)
    made = {
        "of another name": save_profile(random_profile(identity, "cold"), folder).read_bytes(),
        "zero": save_profile(zero, folder).read_bytes(),
        "of other weights": save_profile(random_profile(other, "warm"), folder).read_bytes(),
        "of another shape": save_profile(random_profile(smaller, "warm"), folder).read_bytes(),
    }
    return {
        **made,
        "nothing": b"",
        "text": b"<html>404</html>" * 100,
        "half": whole[: len(whole) // 2],
        "cut in its header": whole[:20],
        "a header of a terabyte": (2**40).to_bytes(8, "little") + whole[8:],
        "a header of 2^64 - 1": b"\xff" * 8 + whole[8:],
        "more behind it": whole + b"\0" * 4096,
        "not finite": nan,
        "a pickle": b"\x80\x04\x95" + b"\0" * 500,
    }


def test_what_is_no_profile_changes_nothing(
    engine: TorchEngine, client: httpx.Client, files: list[bytes], directory: Path, tmp_path: Path
) -> None:
    put(client, files[7])
    before, held = tree(directory), engine.stats().profiles
    refused = bad_files(engine, files, tmp_path / "bad")
    for what, data in refused.items():
        error = error_of(put(client, data), 400)
        assert error["code"] in ("invalid_profile", "profile_model_mismatch"), what
        assert str(directory) not in error["message"]
    assert tree(directory) == before
    assert engine.stats().profiles == held
    assert used(client, "warm") == version_of(files[7])
    assert len(changes(client)) == 1
    metrics = client.get("/metrics").text
    assert f'trimtab_profile_changes_total{{action="upload",outcome="rejected"}} {len(refused)}.0' in metrics
    assert 'trimtab_profile_changes_total{action="upload",outcome="done"} 1.0' in metrics


def test_a_file_that_is_too_large_is_not_received(client: httpx.Client, files: list[bytes], directory: Path) -> None:
    put(client, files[0])
    before = tree(directory)
    million = bytes(2**20)

    def chunks() -> Iterator[bytes]:
        yield (64).to_bytes(8, "little")
        for _ in range(100):
            yield million

    error = error_of(put(client, chunks()), 413)
    assert error["message"] == f"the file has more than {MAX_FILE_BYTES} bytes: it is no profile; is it a model?"
    error_of(put(client, million * 100), 413)
    assert tree(directory) == before


NAMES = [
    "..",
    ".",
    "%2e%2e",
    "..%2fwarm",
    "%2fetc%2fpasswd",
    "a%2fb",
    "..%5cwarm",
    "warm%00",
    "warm%0a",
    "warm%0d%0ax",
    "%1b%5b31m",
    "WARM",
    "%C3%BC",
    "%ff%fe",
    "%e2%80%ae",
    "a" * 65,
    ".trimtab",
    ".warm",
    "warm%23stable",
    "warm%20",
    "%20",
    "-warm",
    "con%3a",
]


@pytest.mark.parametrize("name", NAMES)
def test_no_name_leaves_the_directory(client: httpx.Client, files: list[bytes], directory: Path, name: str) -> None:
    put(client, files[0])
    before, beside = tree(directory), sorted(directory.parent.iterdir())
    address = (client.base_url.host, client.base_url.port)
    for method, path in (
        ("PUT", f"/profiles/{name}"),
        ("DELETE", f"/profiles/{name}"),
        ("POST", f"/profiles/{name}/rollback"),
        ("GET", f"/profiles/{name}/file"),
        ("GET", f"/profiles/{name}/versions"),
        ("DELETE", f"/profiles/{name}/versions/{version_of(files[0])}"),
        ("PUT", f"/profiles/{name}/aliases/stable"),
        ("GET", f"/profiles/warm/file?version={name}"),
        ("DELETE", f"/profiles/warm/versions/{name}"),
    ):
        body = files[1] if path.endswith(name) and method == "PUT" else b"{}"
        with socket.create_connection(address) as connection:  # httpx would resolve the dots
            head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
            head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert int(answer.split(b" ", 2)[1]) in (400, 404, 405), (method, path, answer)
    assert tree(directory) == before
    assert sorted(directory.parent.iterdir()) == beside


def test_a_client_that_goes_away_leaves_nothing(client: httpx.Client, files: list[bytes], directory: Path) -> None:
    put(client, files[0])
    before = tree(directory)
    uploads = directory / ".trimtab/uploads"
    for sent in (0, 4, len(files[1]) // 2, len(files[1]) - 1):
        with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
            head = f"PUT /profiles/warm HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(files[1])}\r\n\r\n"
            connection.sendall(head.encode() + files[1][:sent])
            until(lambda: len(list(uploads.iterdir())) == 1)
        until(lambda: not list(uploads.iterdir()))
    assert tree(directory) == before
    until(lambda: 'action="upload",outcome="rejected"} 4.0' in client.get("/metrics").text)


def test_two_servers_on_one_directory_and_one_wins_each_version(
    engine: TorchEngine, files: list[bytes], directory: Path
) -> None:
    with live_server(engine, directory) as one, live_server(engine, directory) as other, ThreadPoolExecutor(4) as pool:
        put(one, files[0])
        until(lambda: other.get("/profiles/warm").status_code == 200)
        current, order = version_of(files[0]), [version_of(files[0])]
        for round_ in range(6):
            candidates = [data for data in files if version_of(data) != current][round_ % 4 :][:4]
            asked = [
                pool.submit(put, server, data, if_match=f'"{current}"')
                for server, data in zip((one, other, one, other), candidates, strict=True)
            ]
            statuses = Counter(answer.result().status_code for answer in asked)
            assert statuses == {200: 1, 412: 3}
            current = next(answer.result().json()["version"] for answer in asked if answer.result().status_code == 200)
            order.append(current)
            for server in (one, other):
                until(lambda server=server, version=current: used(server, "warm") == version)  # type: ignore[misc]
        uploads = [(entry.get("from_version"), entry["to_version"]) for entry in reversed(changes(one))]
        assert uploads == list(zip([None, *order[:-1]], order, strict=True))
        assert changes(other) == changes(one)


def test_a_full_disk_changes_nothing_and_says_so(client: httpx.Client, files: list[bytes], directory: Path) -> None:
    put(client, files[0])
    before = tree(directory)
    with full_disk(len(files[1]) // 2):
        error = error_of(put(client, files[1]), 507)
    assert (error["code"], error["message"]) == (
        "disk_full",
        "the profile directory cannot take the file (File too large): free space on its disk",
    )
    assert tree(directory) == before
    assert used(client, "warm") == version_of(files[0])
    assert put(client, files[1]).status_code == 200


@pytest.mark.parametrize("failing", ["keep", "write_record", "place"])
def test_a_disk_that_fails_in_the_middle_changes_nothing(
    client: httpx.Client, files: list[bytes], directory: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    put(client, files[0])
    before = tree(directory)
    replace = Path.replace
    copy = f"profiles/warm/{version_of(files[1])}.safetensors"
    part = {"keep": copy, "write_record": "record.json", "place": "warm.safetensors"}[failing]

    def fail(self: Path, target: Path) -> Path:
        if str(target).endswith(part) and not failed:
            failed.append(target)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(self, target)

    failed: list[Path] = []
    monkeypatch.setattr(Path, "replace", fail)
    assert error_of(put(client, files[1]), 507)["code"] == "disk_full"
    assert failed
    after = tree(directory)
    assert {path: data for path, data in after.items() if path != f".trimtab/{copy}"} == before
    assert used(client, "warm") == version_of(files[0])
    actions = [one["action"] for one in changes(client)]
    assert actions == ["upload"] if failing == "keep" else ["upload_failed", "upload", "upload"]


def test_a_read_only_directory_says_what_to_do(
    client: httpx.Client, files: list[bytes], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(client, files[0])
    before = tree(directory)

    def refuse(self: Path, *given: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    for answer in (
        put(client, files[1]),
        client.delete("/profiles/warm"),
        client.post("/profiles/warm/rollback", json={}),
    ):
        if answer.status_code == 404:  # there is nothing to go back to
            continue
        error = error_of(answer, 409)
        assert error["code"] == "profiles_read_only"
        assert error["message"].startswith("the profile directory cannot be written (Read-only file system): mount it")
    monkeypatch.undo()
    assert tree(directory) == before


def test_files_that_cannot_be_looked_at_are_a_metric(client: httpx.Client, files: list[bytes], directory: Path) -> None:
    def metric(name: str) -> bool:
        return f"trimtab_profile_{name}" in client.get("/metrics").text

    put(client, files[0])
    assert metric("files_unreadable 0.0")
    assert metric("directory_unreadable 0.0")
    os.mkfifo(directory / "cold.safetensors")
    (directory / "ODD.safetensors").write_bytes(files[0])
    until(lambda: metric("files_unreadable 2.0"))
    directory.rename(directory.with_name("away"))
    until(lambda: metric("directory_unreadable 1.0"))
    directory.with_name("away").rename(directory)
    until(lambda: metric("directory_unreadable 0.0"))
    assert used(client, "warm") == version_of(files[0])


def test_the_methods_of_a_path_are_all_named(client: httpx.Client) -> None:
    for path, methods in (("/profiles/warm", "DELETE, GET, PUT"), ("/profiles/warm/aliases/stable", "DELETE, PUT")):
        answer = client.patch(path)
        assert error_of(answer, 405)["code"] == "method_not_allowed"
        assert answer.headers["allow"] == methods


def test_a_change_that_cannot_be_logged_is_refused(engine: TorchEngine, files: list[bytes], tmp_path: Path) -> None:
    directory = tmp_path / "profiles"
    with live_server(engine, directory, audit_log=tmp_path / "missing/audit.jsonl") as client:
        error = error_of(put(client, files[0]), 503)
        assert error["message"] == ("the audit log cannot be written (No such file or directory): check --audit-log")
        assert not (directory / "warm.safetensors").exists()
        assert client.get("/profiles").json() == {"profiles": []}
        (tmp_path / "missing").mkdir()
        assert put(client, files[0]).status_code == 201
        assert [one["action"] for one in changes(client)] == ["upload"]


def test_a_quota_refuses_what_would_be_too_much(engine: TorchEngine, directory: Path) -> None:
    big = {"description": "x" * 300_000}
    identity = engine.info.identity
    profiles = [random_profile(identity, "warm", seed=seed, **big) for seed in range(3)]
    made = [save_profile(profile, directory.parent / "made").read_bytes() for profile in profiles]
    with live_server(engine, directory, profile_quota_bytes=2**20) as client:
        assert put(client, made[0]).status_code == 201
        assert put(client, made[1]).status_code == 200
        before = tree(directory)
        error = error_of(put(client, made[2]), 413)
        old = version_of(made[0])[:8]
        assert error["code"] == "quota_exceeded"
        assert f"of at most {2**20} (--profile-quota-bytes): delete /profiles/warm/versions/{old}" in error["message"]
        assert tree(directory) == before
        assert client.delete(f"/profiles/warm/versions/{old}").status_code == 200
        assert put(client, made[2]).status_code == 200


def test_the_audit_log_says_who_has_changed_what(engine: TorchEngine, files: list[bytes], tmp_path: Path) -> None:
    keys, log = tmp_path / "keys", tmp_path / "audit.jsonl"
    admin, _ = add_key(keys, "team", ["admin"])
    user, _ = add_key(keys, "user")
    first, second = map(version_of, files[:2])
    with live_server(engine, tmp_path / "profiles", api_key_file=keys, audit_log=log) as client:
        for method, path in (
            ("PUT", "/profiles/warm"),
            ("DELETE", "/profiles/warm"),
            ("POST", "/profiles/warm/rollback"),
            ("GET", "/profiles/warm/file"),
            ("GET", "/profiles/warm/versions"),
            ("PUT", "/profiles/warm/aliases/stable"),
            ("GET", "/audit"),
        ):
            assert error_of(client.request(method, path, headers=bearer(user)), 403)["code"] == "insufficient_scope"
        client.headers.update(bearer(admin))
        assert put(client, files[0], x_request_id="first-change").status_code == 201
        put(client, files[1])
        put(client, files[2], if_match=f'"{first}"')  # refused
        client.put("/profiles/warm/aliases/canary", json={"version": first, "share": 0.1})
        client.post("/profiles/warm/rollback", json={})
        client.delete("/profiles/warm/aliases/canary")
        client.delete("/profiles/warm")
        answer = check_answer(client.get("/audit"), "/audit", "get")["changes"]
        assert changes(client, limit=1) == answer[:1]
        assert changes(client, profile="cold") == []
    found = [json.loads(line) for line in log.read_text().splitlines()]
    assert found == list(reversed(answer))
    assert [(one["action"], one.get("from_version"), one.get("to_version"), one["key"]) for one in found] == [
        ("upload", None, first, "team"),
        ("upload", first, second, "team"),
        ("alias", None, first, "team"),
        ("rollback", second, first, "team"),
        ("unalias", first, None, "team"),
        ("delete", first, None, "team"),
    ]
    assert found[0]["request_id"] == "first-change"
    assert (found[2]["alias"], found[2]["share"]) == ("canary", 0.1)
    assert oct(log.stat().st_mode)[-3:] == "640"


def test_files_by_hand_and_by_request_make_one_history(
    engine: TorchEngine, client: httpx.Client, files: list[bytes], directory: Path
) -> None:
    put(client, files[0])
    (directory / "warm.safetensors").write_bytes(files[1])
    until(lambda: used(client, "warm") == version_of(files[1]))
    put(client, files[2])
    versions = [version_of(data) for data in files[:3]]
    until(lambda: len(changes(client)) == 3)
    assert [(one["action"], one["to_version"]) for one in changes(client)] == [
        ("upload", versions[2]),
        ("found", versions[1]),
        ("upload", versions[0]),
    ]
    assert [used(client, f"warm#{version[:8]}") for version in versions] == versions
    assert set(ProfileStore(directory).record("warm").versions) == set(versions)


def test_the_examples_of_the_document_work(client: httpx.Client, files: list[bytes]) -> None:
    """With a version of this server in place of the example's."""
    for data in files[:3]:
        put(client, data)
    kept = version_of(files[0])[:8]
    for path, method in sorted(CHANGES, key=lambda one: (one[1] == "delete", one[0] == "/profiles/{name}", one)):
        route = DOCUMENT["paths"][path][method]
        given = path.replace("{name}", "warm").replace("{alias}", "stable").replace("{version}", kept)
        content = route.get("requestBody", {}).get("content", {})
        body: dict[str, Any] = {}
        if "application/json" in content:
            schema = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
            (example,) = DOCUMENT["components"]["schemas"][schema]["examples"]
            body["json"] = {**example, **({"version": kept} if "version" in example else {})}
        elif FILE in content:
            body["content"] = files[3]
        answer = client.request(method, given, **body)
        assert answer.status_code == 200, (method, given, answer.text)
        if path == "/profiles/{name}/rollback":
            put(client, files[2])


def test_no_more_uploads_at_once_than_may_be(client: httpx.Client, files: list[bytes], directory: Path) -> None:
    address = (client.base_url.host, client.base_url.port)
    head = f"PUT /profiles/warm HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(files[0])}\r\n\r\n".encode()
    held = [socket.create_connection(address) for _ in range(4)]
    try:
        for connection in held:
            connection.sendall(head + files[0][:100])
        until(lambda: len(list((directory / ".trimtab/uploads").glob("*"))) == 4)
        assert error_of(put(client, files[1]), 429)["code"] == "overloaded"
    finally:
        for connection in held:
            connection.close()
    until(lambda: put(client, files[1]).status_code in (200, 201))
