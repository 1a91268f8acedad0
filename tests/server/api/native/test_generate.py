"""The native routes on the demo model: /generate, /profiles and the operator's routes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from server.engines.torch.engine import TorchEngine
from tests.support.serving import demo_engine, live_server, save_profiles

BODY: dict[str, Any] = {"prompt": "Bread is", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def engine() -> Iterator[TorchEngine]:
    with demo_engine(slots=2) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine: TorchEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    directory = tmp_path_factory.mktemp("profiles")
    save_profiles(directory, engine.info.identity, "warm", "concise", unit=100.0, description="random")
    (directory / "broken.safetensors").write_bytes(b"no")
    with live_server(engine, directory) as client:
        yield client


def generate(client: httpx.Client, **change: Any) -> dict[str, Any]:
    response = client.post("/generate", json={**BODY, **change})
    assert response.status_code == 200, response.text
    return dict(response.json())


def test_an_answer_has_these_fields(client: httpx.Client) -> None:
    answer = generate(client, profile="warm", strength=0.5)
    assert list(answer) == ["id", "text", "finish_reason", "stop_reason", "usage", "steering"]
    assert answer["id"].startswith("gen-")
    assert (answer["finish_reason"], answer["usage"]["completion_tokens"]) == ("length", 8)
    assert (answer["steering"][0]["name"], answer["steering"][0]["strength"]) == ("warm", 0.5)


def test_a_profile_alone_is_at_strength_one(client: httpx.Client) -> None:
    assert generate(client, profile="warm")["steering"][0]["strength"] == 1


def test_both_ways_to_steer_are_one(client: httpx.Client) -> None:
    short, long = generate(client, profile="warm", strength=-0.5), generate(client, steering="warm@-0.5")
    assert (short["text"], short["steering"]) == (long["text"], long["steering"])
    assert short["text"] != generate(client)["text"]


def test_strength_zero_is_the_untouched_model(client: httpx.Client) -> None:
    assert generate(client, profile="warm", strength=0)["text"] == generate(client)["text"]


def test_defaults_of_length(client: httpx.Client) -> None:
    assert generate(client, max_tokens=None, ignore_eos=True)["usage"]["completion_tokens"] == 16
    messages = [{"role": "user", "content": "How do I bake bread?"}]
    assert generate(client, prompt=None, messages=messages, max_tokens=None)["finish_reason"] == "stop"


def test_a_stream_is_its_whole(client: httpx.Client) -> None:
    generate(client, profile="warm", strength=0.5)  # so that as much of the prompt is cached for both that follow
    whole = generate(client, profile="warm", strength=0.5)
    response = client.post("/generate", json={**BODY, "profile": "warm", "strength": 0.5, "stream": True})
    *frames, nothing = response.text.split("\n\n")
    events = [json.loads(one.removeprefix("data: ")) for one in frames]
    assert nothing == ""
    assert len({event["id"] for event in events}) == 1
    assert all(set(event) == {"id", "delta"} for event in events[:-1])
    assert "".join(event["delta"] for event in events[:-1]) == whole["text"]
    rest = {key: value for key, value in whole.items() if key not in ("id", "text")}
    assert {key: value for key, value in events[-1].items() if key != "id"} == rest


def test_profiles_are_listed_with_what_is_wrong(client: httpx.Client) -> None:
    broken, concise, warm = client.get("/profiles").json()["profiles"]
    assert set(broken) == {"name", "status", "error"}
    assert (broken["name"], broken["status"]) == ("broken", "rejected")
    assert (concise["name"], warm["name"]) == ("concise", "warm")
    assert (warm["status"], warm["method"], warm["layers"], warm["max_strength"]) == (
        "served",
        "random",
        [1, 3, 5, 7],
        2.0,
    )
    assert len(warm["version"]) == 64


def test_one_profile_in_full(client: httpx.Client, engine: TorchEngine) -> None:
    warm = client.get("/profiles/warm").json()
    assert (warm["status"], warm["description"]) == ("served", "random")
    assert warm["model"]["fingerprint"] == engine.info.identity.fingerprint
    assert set(warm["direction_norms"]) == {"1", "3", "5", "7"}
    assert client.get("/profiles/broken").json()["status"] == "rejected"


def test_the_operators_routes(client: httpx.Client) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready", "model": "demo", "profiles": 2, "rejected": ["broken"]}
    version = client.get("/version").json()
    assert {"version", "torch", "transformers", "model"} <= set(version)
    assert version["model"] == "demo"
