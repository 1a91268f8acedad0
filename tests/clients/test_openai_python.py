"""The `openai` package for Python."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.clients.page import example

MESSAGES: list[Any] = [{"role": "user", "content": "How do I bake bread?"}]
CHAT: dict[str, Any] = {"model": "demo", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
WARM = {"name": "warm", "strength": 0.8}


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def receipt(answer: Any) -> list[dict[str, Any]]:
    return [{"name": one["name"], "strength": one["strength"]} for one in answer.model_extra["steering"]]


def test_the_page(url: str) -> None:
    code = example("python", "from openai", url)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip()


def test_a_chat(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**CHAT)
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].message.content
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


@pytest.mark.parametrize("model", ["demo", "demo:warm@0.8"])
def test_a_stream_is_the_whole(client: openai.OpenAI, model: str) -> None:
    asked = {**CHAT, "model": model}
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    assert "".join(one.choices[0].delta.content or "" for one in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens  # type: ignore[union-attr]
    assert receipt(chunks[-1]) == receipt(whole) == ([WARM] if model != "demo" else [])


def test_the_stream_manager(client: openai.OpenAI) -> None:
    """It puts the chunks together itself, log-probabilities included, and raises on shapes that it cannot add."""
    asked = {name: value for name, value in CHAT.items() if name != "max_tokens"}  # it takes a cut reply for a failure
    with client.chat.completions.stream(**asked, logprobs=True, top_logprobs=2) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta"} <= kinds
    assert final.choices[0].message.content == whole.choices[0].message.content
    told, expected = (choice.logprobs and choice.logprobs.content for choice in (final.choices[0], whole.choices[0]))
    assert [one.token for one in told or []] == [one.token for one in expected or []]


def test_choices(client: openai.OpenAI) -> None:
    drawn = {**CHAT, "temperature": 1, "seed": 7, "n": 3}
    whole = client.chat.completions.create(**drawn)
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**drawn, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_logprobs(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=4).choices[0]
    assert choice.logprobs is not None
    tokens = choice.logprobs.content or []
    assert b"".join(bytes(one.bytes or []) for one in tokens).decode() == choice.message.content
    assert all(one.top_logprobs[0].token == one.token and len(one.top_logprobs) == 4 for one in tokens)


def test_completions(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="demo", prompt=["Bread is", "Tea is"], max_tokens=4, temperature=0)
    assert [choice.index for choice in whole.choices] == [0, 1]
    parts = client.completions.create(model="demo", prompt="Tea is", max_tokens=4, temperature=0, stream=True)
    assert "".join(part.choices[0].text for part in parts) == whole.choices[1].text


def test_an_echo_scores_the_prompt(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"prompt": "Bread is baked.", "echo": True, "logprobs": 1, "max_tokens": 0}
    plain, steered = (client.completions.create(model=model, **asked).choices[0] for model in ("demo", "demo:warm@0.8"))
    assert plain.text == "Bread is baked."
    assert plain.logprobs is not None
    assert steered.logprobs is not None
    assert "".join(plain.logprobs.tokens or []).endswith("Bread is baked.")
    first, *others = plain.logprobs.token_logprobs or []
    assert first is None
    assert others != (steered.logprobs.token_logprobs or [])[1:]


def test_three_ways_to_steer(client: openai.OpenAI) -> None:
    alias = client.chat.completions.create(**{**CHAT, "model": "demo:warm@0.8"})
    field = client.chat.completions.create(**CHAT, extra_body={"steering": {"profiles": [WARM]}})
    header = client.chat.completions.create(**CHAT, extra_headers={"x-trimtab-steering": "warm@0.8"})
    assert alias.choices[0].message == field.choices[0].message == header.choices[0].message
    assert alias.choices[0].message != client.chat.completions.create(**CHAT).choices[0].message
    assert receipt(alias) == receipt(field) == receipt(header) == [WARM]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo", "demo:concise", "demo:warm"]
    assert client.models.retrieve("demo:warm").owned_by == "trimtab"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize(
    ("change", "kind", "param"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model"),
        ({"model": "demo:kind"}, openai.NotFoundError, "steering"),
        ({"model": "demo:warm@9"}, openai.BadRequestError, "strength"),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools"),
    ],
)
def test_errors(client: openai.OpenAI, change: dict[str, Any], kind: type[openai.APIStatusError], param: str) -> None:
    for stream in (False, True):
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**{**CHAT, **change, "stream": stream})
        assert caught.value.param == param
        assert caught.value.type == "invalid_request_error"


def test_the_async_client(url: str) -> None:
    async def ask(client: openai.AsyncOpenAI, strength: float) -> tuple[str, str]:
        asked = {**CHAT, "model": f"demo:warm@{strength}"}
        whole = await client.chat.completions.create(**asked)
        stream = await client.chat.completions.create(**asked, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        return whole.choices[0].message.content or "", text

    async def scenario() -> list[tuple[str, str]]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, strength) for strength in (-0.8, 0, 0.8)))

    found = asyncio.run(scenario())
    assert all(whole == streamed for whole, streamed in found)
    assert len(set(found)) == 3
