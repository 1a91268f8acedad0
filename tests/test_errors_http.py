"""Bad input over HTTP: each answer's status and exact error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from server.engine.engine import TorchEngine
from steering_vectors.profile import ModelIdentity
from steering_vectors.storage import save_profile
from tests.serving import client_fixture, engine_fixture, live_server, profiles_fixture, random_profile, until

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
COMPLETION = {"model": "demo", "prompt": "Hello", "max_tokens": 1}
engine = engine_fixture(slots=2, context=64, max_queue=4)
profiles = profiles_fixture("warm", "concise")
client = client_fixture(max_queue=4)


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("change", "status", "param", "message"),
    [
        (
            {"steering": "kind"},
            404,
            "steering",
            "profile 'kind' is not served; served are: concise, warm",
        ),
        (
            {"model": "other"},
            404,
            "model",
            "model 'other' is not served; this server has 'demo' and, steered, 'demo:PROFILE@STRENGTH'",
        ),
        (
            {"model": "demo:warm", "steering": "warm"},
            400,
            "steering",
            "both the model's alias 'demo:warm' and the field steering steer: use only one of them",
        ),
        (
            {"steering": "warm@2.5"},
            400,
            "strength",
            "strength 2.5 of profile 'warm' is beyond its safe range of ±2; "
            "set steering.allow_beyond_safe to true to go beyond it",
        ),
        (
            {"steering": "warm@1.5+concise@-1"},
            400,
            "steering",
            "the strengths of this mix add up to 2.5, beyond the safe range of 2; "
            "set steering.allow_beyond_safe to true to go beyond it",
        ),
        (
            {"steering": "warm@@1"},
            400,
            "steering",
            "steering 'warm@@1' cannot be read at 'warm@@1'; write for example 'warm@0.8+concise@-0.3'",
        ),
        (
            {"steering": {"profiles": [{"name": "warm", "layers": [2]}]}},
            400,
            "steering.layers",
            "profile 'warm' has no direction at layer 2; it has layers [1, 3, 5, 7]",
        ),
        (
            {"steering": {"profiles": [{"name": "warm", "amount": 1}]}},
            400,
            "steering.profiles[0].amount",
            "unknown field 'steering.profiles[0].amount'",
        ),
        ({"steering": {}}, 400, "steering.profiles", "field 'steering.profiles' is missing"),
        ({"temprature": 1}, 400, "temprature", "unknown field 'temprature'"),
        ({"temprature": None}, 400, "temprature", "unknown field 'temprature'"),
        ({"messages": []}, 400, "messages", "messages is empty; send at least one message"),
        ({"messages": None}, 400, "messages", "field 'messages' is missing"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            400,
            "messages[0].role",
            "field 'messages[0].role': it should be 'system', 'developer', 'user' or 'assistant', not \"tool\"",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            400,
            "messages[0].content",
            "field 'messages[0].content': a content part of type 'image_url' is not supported, only text",
        ),
        ({"max_tokens": True}, 400, "max_tokens", "field 'max_tokens': it should be a valid integer, not true"),
        ({"max_tokens": 0}, 400, "max_tokens", "max_tokens must be at least 1; 0 is for completions with echo"),
        (
            {"max_completion_tokens": 2},
            400,
            "max_completion_tokens",
            "max_tokens and max_completion_tokens differ: set only one of them",
        ),
        ({"temperature": -1}, 400, "temperature", "temperature must lie in 0 to 100, not -1.0"),
        ({"top_p": 0}, 400, "top_p", "top_p must lie above 0 and up to 1, not 0.0"),
        ({"n": 129}, 400, "n", "field 'n': it should be less than or equal to 128, not 129"),
        (
            {"n": 7},
            400,
            "n",
            "7 choices are more than the 6 that this server runs and queues: ask for fewer",
        ),
        ({"stop": ["x"] * 17}, 400, "stop", "field 'stop': list should have at most 16 items after validation, not 17"),
        ({"stop": ""}, 400, "stop", "a stop string must not be empty"),
        ({"top_logprobs": 2}, 400, "top_logprobs", "top_logprobs needs logprobs: set logprobs to true"),
        ({"echo": True}, 400, "echo", "field 'echo' is not supported: leave it out or set it to false"),
        ({"tools": [{}]}, 400, "tools", "field 'tools' is not supported: leave it out or set it to []"),
        (
            {"response_format": {"type": "xml"}},
            400,
            "response_format.type",
            "field 'response_format.type': it should be 'text', 'json_object' or 'json_schema', not \"xml\"",
        ),
        (
            {"stream_options": {"include_usage": True}},
            400,
            "stream_options",
            "stream_options is for streams only: set stream to true",
        ),
        (
            {"chat_template_kwargs": {"tokenize": True}},
            400,
            "chat_template_kwargs",
            "chat_template_kwargs cannot set 'tokenize': it is set by the server; leave it out",
        ),
    ],
)
def test_chat_refuses(client: httpx.Client, change: dict[str, Any], status: int, param: str, message: str) -> None:
    error = error_of(client.post("/v1/chat/completions", json={**CHAT, **change}), status)
    assert (error["message"], error["param"]) == (message, param)


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"prompt": ""}, "prompt", "prompt is empty; send at least one character"),
        (
            {"prompt": []},
            "prompt",
            "field 'prompt': it must be a string or a list of token ids, or a list of either, and not empty",
        ),
        (
            {"prompt": ["x", 1]},
            "prompt",
            "field 'prompt': it must be a string or a list of token ids, or a list of either, and not empty",
        ),
        (
            {"prompt": [3072]},
            "prompt",
            "the prompt has a token id outside of the vocabulary, 0 to 3071",
        ),
        (
            {"prompt": [5] * 64},
            "prompt",
            "the prompt has 64 tokens; the context holds 64, prompt and completion together: shorten the prompt",
        ),
        (
            {"top_logprobs": 2},
            "top_logprobs",
            "field 'top_logprobs' is not supported: leave it out or set it to 0",
        ),
        ({"best_of": 2}, "best_of", "field 'best_of' is not supported: leave it out or set it to 1"),
        ({"suffix": "x"}, "suffix", "field 'suffix' is not supported: leave it out or set it to \"\""),
        (
            {"logit_bias": {"1": 101}},
            "logit_bias.1",
            "field 'logit_bias.1': it should be less than or equal to 100, not 101",
        ),
    ],
)
def test_completions_refuse(client: httpx.Client, change: dict[str, Any], param: str, message: str) -> None:
    error = error_of(client.post("/v1/completions", json={**COMPLETION, **change}), 400)
    assert (error["message"], error["param"]) == (message, param)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "send either prompt or messages: neither is given"),
        (
            {"prompt": "a", "messages": [{"role": "user", "content": "b"}]},
            "send either prompt or messages: both are given",
        ),
        ({"prompt": "a", "strength": 0.5}, "strength is given without profile: name the profile it is for"),
        (
            {"prompt": "a", "profile": "warm", "steering": "warm"},
            "profile and steering are both given: use only one of them",
        ),
        ({"prompt": "a", "n": 2}, "field 'n' is not supported: leave it out or set it to 1"),
    ],
)
def test_generate_refuses(client: httpx.Client, body: dict[str, Any], message: str) -> None:
    assert error_of(client.post("/generate", json=body), 400)["message"] == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model": "demo",', "the body is not valid JSON: EOF while parsing a value at line 1 column 17"),
        (b'{"temperature": NaN}', "the body is not valid JSON: expected value at line 1 column 17"),
        (b'{"temperature": -Infinity}', "the body is not valid JSON: invalid number at line 1 column 18"),
        (b'{"prompt": "\\ud800"}', "the body is not valid JSON: unexpected end of hex escape at line 1 column 19"),
        (b"[" * 10_000, "the body is not valid JSON: recursion limit exceeded at line 1 column 202"),
        (b"\xff", "the body is not valid JSON: expected value at line 1 column 1"),
        (b"", "the body is missing: send a JSON object"),
    ],
)
def test_what_is_not_json_is_refused(client: httpx.Client, content: bytes, message: str) -> None:
    response = client.post("/generate", content=content, headers={"content-type": "application/json"})
    assert error_of(response, 400)["message"] == message


def test_a_number_too_large_for_a_float_is_refused(client: httpx.Client) -> None:
    content = b'{"prompt": "a", "temperature": 1e999}'
    response = client.post("/generate", content=content, headers={"content-type": "application/json"})
    assert error_of(response, 400)["message"].startswith("field 'temperature': it should be a finite number")


def test_a_body_that_is_not_said_to_be_json_is_refused(client: httpx.Client) -> None:
    response = client.post("/generate", content=b'{"prompt": "a"}', headers={"content-type": "text/plain"})
    assert error_of(response, 400)["message"] == "send JSON, with the header Content-Type: application/json"


def test_a_body_that_is_too_large_is_refused(client: httpx.Client) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(33):
            yield b" " * 2**20

    message = "the body is larger than the 33554432 bytes that are taken"
    for content in (b" " * (2**25 + 1), chunks()):
        response = client.post("/generate", content=content, headers={"content-type": "application/json"})
        assert error_of(response, 413)["message"] == message


def test_unknown_routes_and_methods(client: httpx.Client) -> None:
    assert error_of(client.get("/v1/nothing"), 404)["message"] == "there is no route '/v1/nothing'"
    response = client.get("/generate")
    assert error_of(response, 405)["message"] == "'/generate' does not take GET"
    assert response.headers["allow"] == "POST"


def test_unknown_profiles_and_models_are_404(client: httpx.Client) -> None:
    assert error_of(client.get("/profiles/kind"), 404)["code"] == "profile_not_found"
    assert error_of(client.get("/v1/models/other"), 404)["code"] == "model_not_found"


def rejected(client: httpx.Client, name: str) -> str:
    """The error of a file in the profile directory, once it has been looked at; and a request for it is a 404."""

    def listed() -> dict[str, Any]:
        entries = client.get("/profiles").json()["profiles"]
        return next((entry for entry in entries if entry["name"] == name), {})

    until(lambda: listed().get("status") == "rejected", within=2.0)
    error = error_of(client.post("/generate", json={"prompt": "a", "profile": name}), 404)
    assert error["message"] == f"profile {name!r} is not served: {listed()['error']}"
    assert error_of(client.post("/v1/completions", json={**COMPLETION, "model": f"demo:{name}"}), 404) == error
    return str(listed()["error"])


@pytest.fixture
def identity(engine: TorchEngine) -> ModelIdentity:
    return engine.language_model.identity


def test_a_profile_of_another_model(client: httpx.Client, profiles: Path, identity: ModelIdentity) -> None:
    save_profile(random_profile(replace(identity, id="cousin", fingerprint="0" * 64), "foreign"), profiles)
    assert rejected(client, "foreign") == (
        "profile 'foreign' was fitted on 'cousin', whose weights differ from 'demo''s. "
        "Fit it again on this model, or allow the mismatch (--allow-model-mismatch) to use it all the same."
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
    assert "not a whole safetensors file" in rejected(client, "cut")


def test_a_full_queue_is_429_and_frees_what_it_took(client: httpx.Client, engine: TorchEngine) -> None:
    endless = {"prompt": "Hello", "max_tokens": 60, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json={**COMPLETION, **endless, "n": 6}) as full:
        response = client.post("/v1/completions", json={**COMPLETION, "n": 6})
        error = error_of(response, 429)
        assert error["type"] == "rate_limit_error"
        assert response.headers["retry-after"] == "1"
        full.close()
    until(lambda: engine.stats().running + engine.stats().waiting == 0)
    assert client.post("/v1/completions", json={**COMPLETION, "n": 6}).status_code == 200


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
