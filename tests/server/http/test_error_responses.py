"""What is refused over HTTP besides bodies (`test_malformed` has those): sizes, routes, profiles, keys, full queues."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from server.engines.torch.engine import TorchEngine
from steering_vectors.profiles.files import save_profile
from steering_vectors.profiles.profile import ModelIdentity
from tests.support.serving import client_fixture, engine_fixture, live_server, profiles_fixture, random_profile, until

COMPLETION = {"model": "demo", "prompt": "Hello", "max_tokens": 1}
engine = engine_fixture(slots=2, context=64, max_queue=4)
profiles = profiles_fixture("warm", "concise")
client = client_fixture(max_queue=4)


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error", "request_id"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_a_body_that_is_too_large_is_refused(client: httpx.Client) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(4):
            yield b" " * 2**20
        yield b" "

    message = "the body is larger than the limit of 4194304 bytes"
    for content in (b" " * (2**22 + 1), chunks()):
        response = client.post("/generate", content=content, headers={"content-type": "application/json"})
        assert error_of(response, 413)["message"] == message


def test_unknown_routes_and_methods(client: httpx.Client) -> None:
    assert error_of(client.get("/v1/nothing"), 404)["message"] == "there is no route '/v1/nothing'"
    response = client.get("/generate")
    assert error_of(response, 405)["message"] == "'/generate' does not accept GET"
    assert response.headers["allow"] == "POST"


def test_unknown_profiles_and_models_are_404(client: httpx.Client) -> None:
    assert error_of(client.get("/profiles/kind"), 404)["code"] == "profile_not_found"
    assert error_of(client.get("/v1/models/other"), 404)["code"] == "model_not_found"


def rejected(client: httpx.Client, name: str) -> str:
    """The error of a file in the profile directory, once it has been looked at; and a request for it is a 404."""

    def listed() -> dict[str, Any]:
        entries = client.get("/profiles").json()["profiles"]
        return next((entry for entry in entries if entry["name"] == name), {})

    until(lambda: listed().get("status") == "rejected")
    error = error_of(client.post("/generate", json={"prompt": "a", "steering": name}), 404)
    assert error["message"] == f"profile {name!r} is not served: {listed()['error']}"
    assert error_of(client.post("/v1/completions", json={**COMPLETION, "model": f"demo:{name}"}), 404) == error
    return str(listed()["error"])


@pytest.fixture
def identity(engine: TorchEngine) -> ModelIdentity:
    return engine.info.identity


def test_a_profile_of_another_model(client: httpx.Client, profiles: Path, identity: ModelIdentity) -> None:
    save_profile(random_profile(replace(identity, id="cousin", fingerprint="0" * 64), "foreign"), profiles)
    assert rejected(client, "foreign") == (
        "profile 'foreign' was fitted on 'cousin', whose weights differ from 'demo''s. "
        "Fit it again on this model, or set allow_model_mismatch to use it anyway."
    )


def test_a_profile_of_another_size(client: httpx.Client, profiles: Path, identity: ModelIdentity) -> None:
    save_profile(random_profile(replace(identity, id="big", hidden_size=16), "wide"), profiles)
    assert rejected(client, "wide") == (
        f"profile 'wide' was fitted on 'big' (hidden size 16, {identity.num_layers} blocks); the model here is 'demo' "
        f"(hidden size {identity.hidden_size}, {identity.num_layers} blocks). Fit it again on this model."
    )


def damaged(path: Path, name: str, directory: Path, change: dict[str, torch.Tensor]) -> None:
    """A copy of a profile under another name, with some tensors replaced by hand."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = {"trimtab": file.metadata()["trimtab"].replace('"name": "warm"', f'"name": "{name}"')}
    save_file({**load_file(path), **change}, directory / f"{name}.safetensors", metadata)


def test_a_direction_with_nan(client: httpx.Client, profiles: Path, identity: ModelIdentity) -> None:
    change = {"block.1.direction": torch.full((identity.hidden_size,), torch.nan)}
    damaged(profiles / "warm.safetensors", "nan", profiles, change)
    assert "profile 'nan': the direction at layer 1 has a NaN or infinite entry" in rejected(client, "nan")


def test_a_direction_of_the_wrong_size(client: httpx.Client, profiles: Path, identity: ModelIdentity) -> None:
    damaged(profiles / "warm.safetensors", "short", profiles, {"block.1.direction": torch.ones(3)})
    assert f"is F32 of shape [3], not F32 of shape [{identity.hidden_size}]" in rejected(client, "short")


def test_a_truncated_file(client: httpx.Client, profiles: Path) -> None:
    whole = (profiles / "warm.safetensors").read_bytes()
    (profiles / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "not a complete safetensors file" in rejected(client, "cut")


def test_a_full_queue_is_429_and_frees_what_it_took(client: httpx.Client, engine: TorchEngine) -> None:
    endless = {"prompt": "Hello", "max_tokens": 60, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json={**COMPLETION, **endless, "n": 4}) as full:
        response = client.post("/v1/completions", json={**COMPLETION, "n": 4})
        error = error_of(response, 429)
        assert error["type"] == "rate_limit_error"
        assert response.headers["retry-after"] == "1"
        full.close()
    until(lambda: engine.stats().running + engine.stats().waiting == 0)
    assert client.post("/v1/completions", json={**COMPLETION, "n": 4}).status_code == 200


def test_keys(engine: TorchEngine, profiles: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    with live_server(engine, profiles, api_key_file=keys) as client:
        response = client.get("/v1/models")
        assert error_of(response, 401)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
        for header in (b"Bearer wrong", b"Basic secret", b"secret", b"Bearer \xff"):
            assert client.get("/v1/models", headers={b"authorization": header}).status_code == 401
        assert client.get("/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
        assert client.get("/nothing").status_code == 401
        assert [client.get(path).status_code for path in ("/health", "/ready", "/version")] == [200] * 3
