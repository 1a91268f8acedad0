"""LangChain's ChatOpenAI. Nothing is downloaded: tokens are counted by the server, not with OpenAI's vocabulary."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import openai
import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI

from tests.clients.page import example

QUESTION = "How do I bake bread?"


def chat(url: str, **fields: Any) -> ChatOpenAI:
    fixed = {"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0, "temperature": 0, "max_tokens": 12}
    return ChatOpenAI(**{"model": "demo", **fixed, **fields})


def test_the_page(url: str) -> None:
    code = example("python", "langchain_openai", url)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip()


def test_invoke(url: str) -> None:
    answer = chat(url).invoke([SystemMessage("Be brief."), HumanMessage(QUESTION)])
    assert answer.text
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 12


def test_a_stream_is_the_whole(url: str) -> None:
    model = chat(url, model="demo:warm@0.8", stream_usage=True)
    whole = model.invoke(QUESTION)
    joined = AIMessageChunk("")
    for chunk in model.stream(QUESTION):
        joined += chunk
    assert joined.text == whole.text
    assert joined.usage_metadata == whole.usage_metadata
    assert joined.response_metadata["finish_reason"] == whole.response_metadata["finish_reason"]


def test_batch(url: str) -> None:
    questions = [QUESTION, "How do I make tea?", "How do I plant a tree?"]
    model = chat(url)
    texts = [answer.text for answer in model.batch(questions)]
    assert texts == [model.invoke(question).text for question in questions]
    assert texts == [answer.text for answer in asyncio.run(chat(url).abatch(questions))]
    assert len(set(texts)) == 3


def test_logprobs(url: str) -> None:
    answer = chat(url).bind(logprobs=True, top_logprobs=2).invoke(QUESTION)
    told = answer.response_metadata["logprobs"]["content"]
    assert b"".join(bytes(one["bytes"]) for one in told).decode() == answer.text
    assert all(one["logprob"] <= 0 and len(one["top_logprobs"]) == 2 for one in told)


def test_three_ways_to_steer(url: str) -> None:
    ways: list[dict[str, Any]] = [
        {"model": "demo:warm@0.8"},
        {"extra_body": {"steering": "warm@0.8"}},
        {"default_headers": {"x-trimtab-steering": "warm@0.8"}},
    ]
    (steered,) = {chat(url, **way).invoke(QUESTION).text for way in ways}
    assert steered != chat(url).invoke(QUESTION).text


def test_errors(url: str) -> None:
    with pytest.raises(openai.NotFoundError, match="profile 'kind' is not served"):
        chat(url, model="demo:kind").invoke(QUESTION)
    with pytest.raises(openai.BadRequestError, match="unknown field 'temprature'"):
        list(chat(url, extra_body={"temprature": 1}).stream(QUESTION))


def test_tokens_are_counted_by_the_models_own_tokenizer(url: str) -> None:
    model = chat(url, custom_get_token_ids=lambda text: list(text.encode()))
    assert model.get_num_tokens("bread") == 5
