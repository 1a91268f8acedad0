"""`trimtab profiles` against a live server."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from server import cli
from server.access.keys import add_key
from server.chat.remote import RemoteError
from server.engines.torch.engine import TorchEngine
from steering_vectors.errors import TrimtabError
from steering_vectors.profiles.files import save_profile
from tests.support.serving import engine_fixture, live_server, random_profile

pytestmark = pytest.mark.slow

engine = engine_fixture(slots=2, context=64)
Run = Callable[..., str]


@pytest.fixture
def client(engine: TorchEngine, tmp_path: Path) -> Iterator[httpx.Client]:
    keys = tmp_path / "keys"
    secret, _ = add_key(keys, "team", ["admin"])
    with live_server(engine, tmp_path / "profiles", api_key_file=keys) as client:
        client.headers["authorization"] = f"Bearer {secret}"
        yield client


@pytest.fixture
def run(client: httpx.Client) -> Run:
    """The output of a command that succeeds; raises its error."""
    environment = {
        "TRIMTAB_URL": str(client.base_url),
        "TRIMTAB_API_KEY": client.headers["authorization"].removeprefix("Bearer "),
    }

    def run(*words: Any) -> str:
        result = CliRunner().invoke(cli.app, ["profiles", *map(str, words)], env=environment)
        if isinstance(result.exception, TrimtabError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


@pytest.fixture
def files(engine: TorchEngine, tmp_path: Path) -> list[Path]:
    identity = engine.info.identity
    return [save_profile(random_profile(identity, "warm", seed=seed), tmp_path / f"made-{seed}") for seed in range(2)]


def version_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_profile_is_pushed_listed_rolled_back_and_deleted(run: Run, files: list[Path], tmp_path: Path) -> None:
    first, second = (version_of(file)[:8] for file in files)
    assert run("push", files[0], "--create") == f"warm is served in version {first}\n"
    assert run("push", files[1], "--if-match", first) == f"warm is served in version {second}\n"
    assert run("list") == f"warm  {second}  served\n"
    lines = run("versions", "warm").splitlines()
    assert [(line.split("  ")[0], line.split("  ")[2:]) for line in lines] == [
        (second, ["team", "current"]),
        (first, ["team"]),
    ]
    assert run("rollback", "warm") == f"warm is served in version {first}\n"
    assert run("rollback", "warm", second) == f"warm is served in version {second}\n"
    out = tmp_path / "out"
    run("pull", "warm", "--out", out, "--version", first)
    assert (out / "warm.safetensors").read_bytes() == files[0].read_bytes()
    with pytest.raises(RemoteError, match="if-match does not allow"):
        run("delete", "warm", "--version", first, "--if-match", first)
    assert run("delete", "warm", "--version", first, "--if-match", second) == f"version {first} of warm was deleted\n"
    assert run("delete", "warm", "--if-match", second) == f"version {second} of warm was deleted\n"
    assert run("list") == ""


def test_aliases_and_the_log(run: Run, files: list[Path]) -> None:
    first, second = (version_of(file)[:8] for file in files)
    run("push", files[0])
    assert run("alias", "warm", "stable") == f"warm#stable is {first}\n"
    run("push", files[1])
    assert run("alias", "warm", "canary", "--share", "0.1") == f"warm#canary is {second} for a share of 0.1\n"
    assert run("list") == f"warm  {second}  served  canary {second} for a share of 0.1  stable {first}\n"
    assert run("alias", "warm", "canary", "--delete") == "warm#canary was deleted\n"
    lines = [line.split("  ") for line in run("log", "warm").splitlines()]
    assert [(who, action, alias, change) for _, who, action, _, alias, change in lines] == [
        ("team", "unalias", "canary", f"{second} -> none"),
        ("team", "alias", "canary", f"none -> {second}"),
        ("team", "upload", "", f"{first} -> {second}"),
        ("team", "alias", "stable", f"none -> {first}"),
        ("team", "upload", "", f"none -> {first}"),
    ]
    assert len(run("log", "--limit", "2").splitlines()) == 2


def test_json_is_the_servers_answer(run: Run, client: httpx.Client, files: list[Path]) -> None:
    assert json.loads(run("push", files[0], "--json")) == client.get("/profiles/warm").json()
    assert json.loads(run("list", "--json")) == client.get("/profiles").json()
    assert json.loads(run("versions", "warm", "--json")) == client.get("/profiles/warm/versions").json()
    assert json.loads(run("log", "--json")) == client.get("/audit").json()
    made = json.loads(run("alias", "warm", "stable", "--json"))
    assert made == {"name": "warm", "alias": "stable", "version": version_of(files[0]), "share": 0.0}


def test_errors_are_the_servers(run: Run, files: list[Path], tmp_path: Path) -> None:
    run("push", files[0])
    with pytest.raises(RemoteError, match="if-none-match does not allow"):
        run("push", files[1], "--create")
    with pytest.raises(RemoteError, match="if-match does not allow"):
        run("push", files[1], "--if-match", "00000000")
    with pytest.raises(RemoteError, match="the metadata has the name 'warm'"):
        run("push", files[1], "--name", "cold")
    with pytest.raises(RemoteError, match="is no name of a profile"):
        run("push", files[1], "--name", "Warm")
    with pytest.raises(RemoteError, match="no version that is kept begins with '00000000'"):
        run("pull", "warm", "--version", "00000000", "--out", tmp_path / "out")
    with pytest.raises(TrimtabError, match="cannot be read"):
        run("push", tmp_path / "nothing.safetensors")
    with pytest.raises(RemoteError, match="no server answers"):
        run("list", "--url", "http://127.0.0.1:9")
