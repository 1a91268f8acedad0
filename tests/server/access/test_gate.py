"""Keys, scopes and owners on a live server."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.access.callers import Caller
from server.access.gate import scope_needed
from server.access.keys import Scope, add_key, revoke_key
from server.engines.torch.engine import TorchEngine
from server.http.throttle import Throttle
from server.settings import load_settings
from tests.server.http.test_error_responses import error_of
from tests.support.running import HeldEngine
from tests.support.serving import engine_fixture, live_server, profiles_fixture, until

pytestmark = pytest.mark.slow

engine = engine_fixture(slots=4, context=64, max_queue=4)
profiles = profiles_fixture("warm", "concise")
ENDLESS = {"prompt": "Bread is", "max_tokens": 50, "ignore_eos": True, "stream": True}


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def status(client: httpx.Client, secret: str | None = None, path: str = "/v1/models") -> int:
    return client.get(path, headers=bearer(secret) if secret else {}).status_code


def test_a_key_of_the_environment_protects_the_server(
    engine: TorchEngine, profiles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_API_KEY", "from-the-environment")
    assert load_settings().requires_keys
    with live_server(engine, profiles) as client:
        assert error_of(client.get("/v1/models"), 401)["code"] == "invalid_api_key"
        assert status(client, "other") == 401
        assert status(client, "from-the-environment") == 200


def test_a_key_of_the_environment_and_a_file_are_both_accepted(
    engine: TorchEngine, profiles: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_bytes(b"\xef\xbb\xbfplain\n")
    hashed, _ = add_key(keys, "team")
    with live_server(engine, profiles, api_key="own", api_key_file=keys) as client:
        assert [status(client, secret) for secret in ("plain", hashed, "own", "team")] == [200, 200, 200, 401]


def test_a_revoked_key_is_refused_without_a_restart(engine: TorchEngine, profiles: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    first, _ = add_key(keys, "first")
    with live_server(engine, profiles, api_key_file=keys) as client:
        assert status(client, first) == 200
        second, _ = add_key(keys, "second")
        revoke_key(keys, "first")
        until(lambda: status(client, first) == 401)
        assert status(client, second) == 200


def test_every_route_needs_a_key_but_those_of_the_servers_state(engine: TorchEngine, profiles: Path) -> None:
    with live_server(engine, profiles, api_key="own") as client:
        document = client.get("/openapi.json").json()
        for path, operations in document["paths"].items():
            for method in operations:
                expected = 200 if path in ("/health", "/ready", "/version") else 401
                assert client.request(method, path).status_code == expected, path
        for path in ("//health", "/health/", "/HEALTH", "/docs-files", "/health/../v1/models", "/nothing"):
            assert status(client, path=path) == 401


def test_what_a_key_must_be_for() -> None:
    needed: dict[tuple[str, str], Scope] = {
        ("GET", "/v1/models"): "generate",
        ("POST", "/generate"): "generate",
        ("PATCH", "/generations/gen-1"): "generate",
        ("GET", "/profiles"): "generate",
        ("GET", "/profiles/warm"): "generate",
        ("GET", "/profiles/warm/file"): "admin",
        ("GET", "/profiles/warm/versions"): "admin",
        ("POST", "/profiles/warm/rollback"): "admin",
        ("GET", "/audit"): "admin",
        ("PUT", "/profiles/warm"): "admin",
        ("DELETE", "/profiles/warm"): "admin",
        ("PATCH", "/settings"): "admin",
        ("POST", "/feedback"): "feedback",
        ("GET", "/jobs"): "admin",
        ("GET", "/jobs/job-1/events"): "admin",
        ("POST", "/jobs/job-1/cancel"): "admin",
        ("POST", "/profiles/warm/fit"): "admin",
    }
    assert {route: scope_needed(*route) for route in needed} == needed


def test_a_key_is_refused_where_its_scopes_do_not_reach(engine: TorchEngine, profiles: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    secrets = {scope: add_key(keys, scope, [scope])[0] for scope in ("generate", "feedback", "admin")}
    with live_server(engine, profiles, api_key_file=keys) as client:
        assert {scope: status(client, secret) for scope, secret in secrets.items()} == {
            "generate": 200,
            "feedback": 403,
            "admin": 200,
        }
        error = error_of(client.delete("/profiles/warm", headers=bearer(secrets["generate"])), 403)
        assert error["code"] == "insufficient_scope"
        assert error["message"] == "the key 'generate' lacks the scope 'admin', which this route needs"
        assert client.delete("/profiles/cold", headers=bearer(secrets["admin"])).status_code == 404


def first_id(lines: Any) -> str:
    return str(next(lines)).partition('"id":"')[2].partition('"')[0]


def test_a_generation_is_changed_only_by_the_key_that_began_it(
    engine: HeldEngine, profiles: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    owner, other = (add_key(keys, name)[0] for name in ("owner", "other"))
    admin, _ = add_key(keys, "admin", ["admin"])
    with live_server(engine, profiles, api_key_file=keys) as client:

        def change(id: str, secret: str) -> httpx.Response:
            return client.patch(f"/generations/{id}", json={"steering": "warm@0.5"}, headers=bearer(secret))

        engine.hold(after=5)
        with client.stream("POST", "/generate", json=ENDLESS, headers=bearer(owner)) as response:
            lines = response.iter_lines()
            id = first_id(lines)
            engine.until_held()
            error = error_of(change(id, other), 404)
            assert error["code"] == "generation_not_found"
            assert error["message"] == f"there is no generation {id!r} here"
            assert error == {**error_of(change("gen-0", other), 404), "message": error["message"]}
            forged = f"{id[:-1]}{'0' if id[-1] != '0' else '1'}"
            assert change(forged, owner).status_code == 404
            engine.go()
            assert '"finish_reason"' in [line for line in lines if line][-1]
        # its end is known to the owner and to an admin alone
        assert [change(id, secret).status_code for secret in (owner, admin, other)] == [409, 409, 404]


def test_the_owner_and_an_admin_change_a_running_generation(engine: HeldEngine, profiles: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    owner, _ = add_key(keys, "owner")
    admin, _ = add_key(keys, "admin", ["admin"])
    for secret in (owner, admin):
        with (
            live_server(engine, profiles, api_key_file=keys) as client,
            client.stream("POST", "/generate", json=ENDLESS, headers=bearer(owner)) as response,
        ):
            lines = response.iter_lines()
            change = {"url": f"/generations/{first_id(lines)}", "json": {"steering": "warm@0.5"}}
            changed = client.patch(**change, headers=bearer(secret))
            assert changed.status_code == 200, changed.text
            assert '"name":"warm"' in [line for line in lines if line][-1]


def test_ids_say_whose_they_are_to_the_server_alone() -> None:
    one, other = (Caller(name, tenant=name, is_admin=False, secret=b"x" * 32) for name in ("one", "other"))
    id = one.new_id("gen")
    assert id != one.new_id("gen")
    assert one.may_change(id)
    assert not other.may_change(id)
    assert not Caller("one", tenant="one", is_admin=False, secret=b"y" * 32).may_change(id)
    assert not one.may_change(Caller().new_id("gen"))
    assert not any(one.may_change(text) for text in ("", "gen-", "gen-é", id[:-16], f"{id}0"))
    assert Caller().may_change(Caller().new_id("gen"))


def test_a_prompt_of_another_key_cannot_be_guessed(engine: TorchEngine, profiles: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    secrets = [add_key(keys, name)[0] for name in ("one", "other")]
    with live_server(engine, profiles, api_key_file=keys) as client:

        def cached(secret: str, pin: int) -> int:
            messages = [{"role": "user", "content": f"My PIN is {pin}, please remember it for me."}]
            body = {"model": "demo", "messages": messages, "max_tokens": 1}
            usage = client.post("/v1/chat/completions", json=body, headers=bearer(secret)).json()["usage"]
            return int(usage["prompt_tokens_details"]["cached_tokens"])

        assert cached(secrets[0], 7341) == 0
        assert cached(secrets[0], 7341) > 0
        assert cached(secrets[1], 7341) == 0
        assert cached(secrets[1], 7341) > 0


def refused(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "server.access.refusals"]


def test_refusals_are_logged_and_counted_once_in_a_while(
    engine: TorchEngine,
    profiles: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.access.refusals.Throttle", lambda: Throttle(clock=lambda: 0.0))
    keys = tmp_path / "keys"
    feedback, _ = add_key(keys, "survey", ["feedback"])
    with live_server(engine, profiles, api_key_file=keys) as client:
        for _ in range(20):
            assert status(client, "wrong", "/v1/mod%0Aels") == 401
            assert status(client, feedback) == 403
    assert refused(caplog) == [
        r"refused GET '/v1/mod\nels' of 127.0.0.1: invalid_api_key",
        "refused GET '/v1/models' of key 'survey': insufficient_scope",
    ]


def test_a_key_is_compared_before_the_body_is_read(engine: TorchEngine, profiles: Path) -> None:
    async def scenario(url: str) -> bytes:
        host, _, port = url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n\r\n")
        line = await reader.readline()
        writer.close()
        return line

    with live_server(engine, profiles, api_key="own") as client:
        assert b" 401 " in asyncio.run(scenario(str(client.base_url).rstrip("/")))


def test_only_admins_are_told_versions_of_libraries(engine: TorchEngine, profiles: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    generate, _ = add_key(keys, "a")
    admin, _ = add_key(keys, "b", ["admin"])
    libraries = {"torch", "transformers"}
    with live_server(engine, profiles, api_key_file=keys) as client:
        assert not libraries & client.get("/version").json().keys()
        assert not libraries & client.get("/version", headers=bearer(generate)).json().keys()
        assert libraries < client.get("/version", headers=bearer(admin)).json().keys()
    with live_server(engine, profiles) as client:
        assert libraries < client.get("/version").json().keys()


def test_clients_are_told_names_and_no_paths(engine: TorchEngine, profiles: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    with live_server(engine, tmp_path, model=str(tmp_path), served_model_name=f"{tmp_path}/tiny") as client:
        assert client.get("/version").json()["model"] == "tiny"
        assert client.get("/ready").json()["model"] == "tiny"
        assert "broken.safetensors" in client.get("/profiles/broken").json()["error"]
        refused = client.post("/generate", json={"prompt": "a", "profile": "broken"}).json()["error"]["message"]
        assert "broken.safetensors" in refused
        assert str(tmp_path) not in client.get("/profiles").text + refused
