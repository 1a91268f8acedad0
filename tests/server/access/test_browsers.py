"""What keeps web pages of others out: the Host header, CORS, and the headers of the page of docs."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from pathlib import Path

import httpx
import pytest

from server.access.browsers import allowed_hosts, host_name
from server.app import create_app
from server.engines.torch.engine import TorchEngine
from server.settings import Settings
from tests.server.http.test_error_responses import error_of
from tests.support.serving import engine_fixture, live_server, profiles_fixture

pytestmark = pytest.mark.slow

engine = engine_fixture(slots=2, context=64)
profiles = profiles_fixture("warm")
ORIGIN = "https://app.example"


def with_host(client: httpx.Client, host: str, path: str = "/v1/models") -> httpx.Response:
    return client.get(path, headers={"host": host})


def test_on_loopback_a_page_with_another_name_is_refused(engine: TorchEngine, profiles: Path) -> None:
    with live_server(engine, profiles) as client:
        error = error_of(with_host(client, "evil.example:8000"), 403)
        assert error["code"] == "host_not_allowed"
        assert "name it with --allowed-hosts" in error["message"]
        for host in (
            "evil.example",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "192.0.2.1",
            "0.0.0.0",
            "x:y:z",
        ):
            assert with_host(client, host).status_code == 403, host
        for host in ("127.0.0.1", "localhost:8000", "LOCALHOST", "127.9.9.9:1", "[::1]:8000", "[::1]", "a.localhost"):
            assert with_host(client, host).status_code == 200, host
        assert with_host(client, "evil.example", "/docs").status_code == 403
        assert [with_host(client, "10.0.0.7:8000", path).status_code for path in ("/health", "/ready")] == [200, 200]


def test_allowed_hosts(engine: TorchEngine, profiles: Path) -> None:
    with live_server(engine, profiles, allowed_hosts="api.example, *.team.example") as client:
        for host in ("api.example", "API.example:443", "a.team.example", "a.b.team.example.", "localhost"):
            assert with_host(client, host).status_code == 200, host
        for host in ("team.example", "evil-team.example", "x.api.example", "evil.example"):
            assert with_host(client, host).status_code == 403, host
    with live_server(engine, profiles, allowed_hosts="*") as client:
        assert with_host(client, "evil.example").status_code == 200


def test_hosts_are_checked_on_loopback_and_where_they_are_named() -> None:
    assert allowed_hosts(Settings()) == ()
    assert allowed_hosts(Settings(host="::1")) == ()
    assert allowed_hosts(Settings(host="0.0.0.0", allow_unauthenticated=True)) is None
    assert allowed_hosts(Settings(host="0.0.0.0", api_key="x", allowed_hosts="a.example")) == ("a.example",)


@pytest.mark.parametrize(
    ("header", "name"),
    [("A.example:80", "a.example"), ("[::1]:80", "::1"), ("::1", ":"), ("a.example.", "a.example"), ("", "")],
)
def test_the_name_in_a_host_header(header: str, name: str) -> None:
    assert host_name(header) == name


def preflight(client: httpx.Client, origin: str = ORIGIN) -> httpx.Response:
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, content-type"}
    return client.options("/generate", headers={"origin": origin, **asked})


def test_pages_of_allowed_origins_may_use_the_server(engine: TorchEngine, profiles: Path) -> None:
    with live_server(engine, profiles, api_key="own", cors_origins=f"{ORIGIN}, http://localhost:3000") as client:
        answer = preflight(client)  # without a key
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert "PATCH" in answer.headers["access-control-allow-methods"]
        assert answer.headers["access-control-allow-headers"] == "authorization, content-type"
        assert preflight(client, "https://evil.example").status_code == 400
        key = {"authorization": "Bearer own", "origin": ORIGIN}
        body = {"prompt": "Bread is", "max_tokens": 2}
        with client.stream("POST", "/generate", json={**body, "stream": True}, headers=key) as one:
            assert one.headers["content-type"].startswith("text/event-stream")
            assert one.headers["access-control-allow-origin"] == ORIGIN
            one.read()
        for status, response in {
            401: client.post("/generate", json=body, headers={"origin": ORIGIN}),
            400: client.post("/generate", json={"no": 1}, headers=key),
            404: client.get("/nothing", headers=key),
            413: client.post("/generate", content=b" " * (2**25 + 1), headers=key),
        }.items():
            assert response.status_code == status
            assert response.headers["access-control-allow-origin"] == ORIGIN
            assert "retry-after" in response.headers["access-control-expose-headers"]
        foreign = client.get("/v1/models", headers={**key, "origin": "https://evil.example"})
        assert "access-control-allow-origin" not in foreign.headers


def test_an_unexpected_error_has_the_headers_of_cors(tmp_path: Path, engine: TorchEngine) -> None:
    app = create_app(Settings(profiles=tmp_path, cors_origins="*"), engine)

    @app.get("/v1/fault")
    async def fault() -> None:
        raise ZeroDivisionError

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/v1/fault", headers={"origin": ORIGIN})

    answer = asyncio.run(ask())
    assert error_of(answer, 500)["code"] == "internal_error"
    assert answer.headers["access-control-allow-origin"] == "*"


def test_without_the_setting_no_page_may_use_the_server(engine: TorchEngine, profiles: Path) -> None:
    with live_server(engine, profiles) as client:
        assert preflight(client).status_code == 405
        answer = client.get("/v1/models", headers={"origin": ORIGIN})
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_headers_of_the_page_and_of_other_answers(engine: TorchEngine, profiles: Path) -> None:
    with live_server(engine, profiles) as client:
        page = client.get("/docs")
        policy = page.headers["content-security-policy"]
        scripts = re.findall(r"<script>(.*?)</script>", page.text, re.DOTALL)
        assert len(scripts) == 1
        assert f"'sha256-{base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()}'" in policy
        directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
        assert directives["frame-ancestors"] == directives["default-src"] == "'none'"
        assert "unsafe" not in directives["script-src"]
        model = client.get("/v1/models")
        assert model.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
        for answer in (page, model, client.get("/nothing")):
            assert answer.headers["x-frame-options"] == "DENY"
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "server" not in answer.headers
