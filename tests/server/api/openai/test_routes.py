"""OpenAI's routes on the demo model: shapes, choices, usage, receipts, and streams that equal their wholes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.engines.torch.engine import TorchEngine
from steering_vectors.data.chat import Message, encode_prompt
from tests.support.serving import demo_engine, live_server, save_profiles

MESSAGES = [{"role": "user", "content": "How do I bake bread?"}]
CHAT: dict[str, Any] = {"model": "demo", "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
COMPLETION: dict[str, Any] = {"model": "demo", "prompt": "Bread is", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def engine() -> Iterator[TorchEngine]:
    with demo_engine(slots=4) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine: TorchEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    directory = tmp_path_factory.mktemp("profiles")
    fields = {"unit": 100.0, "calibration": {"kl_at_1": 0.1}}
    save_profiles(directory, engine.info.identity, "warm", "concise", **fields)
    with live_server(engine, directory) as client:
        yield client


def answer(client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def chat(client: httpx.Client, **change: Any) -> dict[str, Any]:
    return answer(client, "/v1/chat/completions", {**CHAT, **change})


def complete(client: httpx.Client, **change: Any) -> dict[str, Any]:
    return answer(client, "/v1/completions", {**COMPLETION, **change})


def chunks(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a stream, whose framing is checked byte by byte."""
    response = client.post(path, json={**body, "stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *frames, end, nothing = response.text.split("\n\n")
    assert (end, nothing) == ("data: [DONE]", "")
    assert all(one.startswith("data: ") and "\n" not in one for one in frames)
    return [json.loads(one.removeprefix("data: ")) for one in frames]


def test_a_chat_completion(client: httpx.Client, engine: TorchEngine) -> None:
    whole = chat(client)
    (choice,) = whole["choices"]
    assert whole["id"].startswith("chatcmpl-")
    assert (whole["object"], whole["model"], whole["steering"]) == ("chat.completion", "demo", [])
    assert choice["message"] == {"role": "assistant", "content": choice["message"]["content"], "refusal": None}
    assert whole["system_fingerprint"].startswith("fp_")
    assert choice["generation_id"].startswith("gen-")
    assert (choice["index"], choice["finish_reason"]) == (0, "length")
    prompt = encode_prompt(engine.info.tokenizer, [Message("user", MESSAGES[0]["content"])])
    usage = {"prompt_tokens": len(prompt), "completion_tokens": 8, "total_tokens": len(prompt) + 8}
    assert {key: whole["usage"][key] for key in usage} == usage
    assert whole["usage"]["prompt_tokens_details"]["cached_tokens"] >= 0


def test_a_chat_without_a_limit_ends_where_the_model_ends(client: httpx.Client) -> None:
    assert chat(client, max_tokens=None)["choices"][0]["finish_reason"] == "stop"


def test_a_completion_has_sixteen_tokens_unless_told(client: httpx.Client) -> None:
    whole = complete(client, max_tokens=None, ignore_eos=True)
    assert (whole["object"], whole["usage"]["completion_tokens"]) == ("text_completion", 16)


def test_text_parts_and_developers_are_read(client: httpx.Client) -> None:
    parts = [{"type": "text", "text": "How do I"}, {"type": "text", "text": "bake bread?"}]
    in_parts = chat(client, messages=[{"role": "user", "content": parts}])
    joined = chat(client, messages=[{"role": "user", "content": "How do I\nbake bread?"}])
    assert in_parts["choices"][0]["message"] == joined["choices"][0]["message"]
    system = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    developer = [{"role": "developer", "content": "Be brief."}, *MESSAGES]
    first, second = (chat(client, messages=messages)["usage"] for messages in (system, developer))
    assert first["prompt_tokens"] == second["prompt_tokens"] == second["prompt_tokens_details"]["cached_tokens"] + 1


def test_fields_that_ask_for_nothing_are_accepted(client: httpx.Client) -> None:
    nothing = {"tools": [], "logprobs": False, "store": False, "best_of": 1, "n": 1, "seed": None, "user": "someone"}
    more = {"response_format": {"type": "text"}, "metadata": {"a": "b"}, "stop": None, "stream_options": None}
    assert chat(client, **nothing, **more)["choices"][0]["message"] == chat(client)["choices"][0]["message"]


@pytest.mark.parametrize("steered", [{"steering": "warm@0.5"}, {"model": "demo:warm@0.5"}])
def test_steering_is_receipted(client: httpx.Client, steered: dict[str, str]) -> None:
    whole = chat(client, **steered)
    (receipt,) = whole["steering"]
    version = client.get("/profiles/warm").json()["version"]
    assert (receipt["name"], receipt["version"], receipt["strength"]) == ("warm", version, 0.5)
    assert (receipt["layers"], receipt["apply_to"]) == ([1, 3, 5, 7], "generated")
    assert receipt["steered_tokens"] == 8  # the last prompt token, and all but the last of the completion
    assert receipt["calibrated"] is True
    assert whole["model"] == steered.get("model", "demo")
    assert whole["choices"][0]["steering"] == whole["steering"]
    assert whole["choices"][0]["message"] != chat(client)["choices"][0]["message"]


def test_the_whole_prompt_is_steered_if_asked(client: httpx.Client) -> None:
    steering = {"profiles": [{"name": "warm", "strength": 0.5, "layers": [3]}], "apply_to": "all"}
    whole = chat(client, steering=steering)
    (receipt,) = whole["steering"]
    assert receipt["steered_tokens"] == whole["usage"]["prompt_tokens"] + 7
    assert (receipt["layers"], receipt["calibrated"]) == ([3], False)


def test_strength_zero_is_the_untouched_model(client: httpx.Client) -> None:
    whole = chat(client, steering="warm@0")
    assert whole["choices"][0]["message"] == chat(client)["choices"][0]["message"]
    (receipt,) = whole["steering"]
    assert (receipt["strength"], receipt["layers"], receipt["steered_tokens"]) == (0, [], 0)


def test_beyond_the_safe_range_if_allowed(client: httpx.Client) -> None:
    steering = {"profiles": [{"name": "warm", "strength": 2.5}], "allow_beyond_safe": True}
    assert chat(client, steering=steering)["steering"][0]["allow_beyond_safe"] is True


def test_a_version_can_be_asked_for(client: httpx.Client) -> None:
    version = client.get("/profiles/warm").json()["version"]
    assert chat(client, model=f"demo:warm#{version[:8]}@0.5")["steering"][0]["version"] == version


def test_choices_differ_repeat_and_the_first_is_the_only_one(client: httpx.Client) -> None:
    drawn = {"temperature": 1, "seed": 7, "steering": "warm@0.2"}
    three, again, one = chat(client, n=3, **drawn), chat(client, n=3, **drawn), chat(client, **drawn)
    texts = [choice["message"]["content"] for choice in three["choices"]]
    assert texts == [choice["message"]["content"] for choice in again["choices"]]
    assert texts[0] == one["choices"][0]["message"]["content"]
    assert len(set(texts)) == 3
    assert len({choice["generation_id"] for choice in three["choices"]}) == 3
    assert [choice["index"] for choice in three["choices"]] == [0, 1, 2]
    assert three["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]
    steered = [choice["steering"][0]["steered_tokens"] for choice in three["choices"]]
    assert three["steering"][0]["steered_tokens"] == sum(steered)
    assert three["usage"]["completion_tokens"] == 24


def test_more_choices_than_slots_all_end(client: httpx.Client) -> None:
    whole = chat(client, n=11, temperature=1)
    assert [choice["index"] for choice in whole["choices"]] == list(range(11))


def test_several_prompts_with_several_choices(client: httpx.Client, engine: TorchEngine) -> None:
    prompts = ["Bread is", "The weather today"]
    whole = complete(client, prompt=prompts, n=2, seed=3, temperature=1)
    alone = [complete(client, prompt=prompt, n=2, seed=3, temperature=1) for prompt in prompts]
    texts = [choice["text"] for choice in whole["choices"]]
    assert texts == [choice["text"] for one in alone for choice in one["choices"]]
    assert whole["usage"]["prompt_tokens"] == sum(one["usage"]["prompt_tokens"] for one in alone)


def test_token_ids_are_the_text_they_stand_for(client: httpx.Client, engine: TorchEngine) -> None:
    ids = encode_prompt(engine.info.tokenizer, "Bread is")
    text = complete(client)["choices"][0]["text"]
    assert complete(client, prompt=ids)["choices"][0]["text"] == text
    assert [choice["text"] for choice in complete(client, prompt=[ids, ids])["choices"]] == [text, text]


def test_a_stop_string_is_cut_off_and_named(client: httpx.Client) -> None:
    text = complete(client, max_tokens=16)["choices"][0]["text"]
    stop = text.split()[2]
    (choice,) = complete(client, max_tokens=16, stop=stop)["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (
        text[: text.index(stop)],
        "stop",
        stop,
    )


@pytest.mark.slow
@pytest.mark.parametrize("usage", [True, False])
@pytest.mark.parametrize("n", [1, 6])
def test_a_chat_stream_is_its_whole(client: httpx.Client, n: int, usage: bool) -> None:
    body = {**CHAT, "steering": "warm@0.5", "temperature": 1, "seed": 5, "n": n}
    options = {"stream_options": {"include_usage": True}} if usage else {}
    whole, parts = chat(client, **body), chunks(client, "/v1/chat/completions", {**body, **options})
    if usage:
        assert parts[-1]["choices"] == []
        assert parts[-1]["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    assert parts[-1]["steering"] == whole["steering"]
    assert [part for part in parts[:-1] if "steering" in part] == []
    assert {part["object"] for part in parts} == {"chat.completion.chunk"}
    for index in range(n):
        mine = [choice for part in parts for choice in part["choices"] if choice["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert mine[0]["generation_id"].startswith("gen-")
        text = "".join(choice["delta"].get("content", "") for choice in mine)
        assert text == whole["choices"][index]["message"]["content"]
        assert [choice["finish_reason"] for choice in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == whole["choices"][index]["finish_reason"]
        assert mine[-1]["steering"] == whole["choices"][index]["steering"]


def test_a_completion_stream_is_its_whole(client: httpx.Client) -> None:
    parts = chunks(client, "/v1/completions", {**COMPLETION, "prompt": ["Bread is", "Tea"]})
    whole = complete(client, prompt=["Bread is", "Tea"])
    for index in range(2):
        pieces = [choice["text"] for part in parts for choice in part["choices"] if choice["index"] == index]
        assert "".join(pieces) == whole["choices"][index]["text"]


def test_models_are_the_base_and_an_alias_for_each_profile(client: httpx.Client) -> None:
    listed = client.get("/v1/models").json()
    assert [entry["id"] for entry in listed["data"]] == ["demo", "demo:concise", "demo:warm"]
    assert {entry["chat_template"] for entry in listed["data"]} == {"tokenizer"}
    assert client.get("/v1/models/demo:warm").json() == listed["data"][2]
    assert chat(client, model="demo:warm")["steering"][0]["strength"] == 1


def test_a_served_name_replaces_the_models_own(engine: TorchEngine, tmp_path: Path) -> None:
    with live_server(engine, tmp_path, served_model_name="org/my:model") as client:
        assert [entry["id"] for entry in client.get("/v1/models").json()["data"]] == ["org/my:model"]
        assert chat(client, model="org/my:model")["model"] == "org/my:model"
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 404


def test_the_openapi_document_names_the_routes(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/generate", "/profiles", "/ready"} <= set(
        document["paths"]
    )
    assert "422" not in document["paths"]["/generate"]["post"]["responses"]
