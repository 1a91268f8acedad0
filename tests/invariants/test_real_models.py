"""Two pretrained models over HTTP: greedy output equals that of transformers' `generate`, token for token."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from server.engines.config import EngineConfig
from server.engines.torch.engine import TorchEngine
from steering_vectors.models.loading import LanguageModel, load_model
from tests.support.serving import live_server, save_profiles

pytestmark = pytest.mark.slow

TOKENS = 200
PROMPT = "Once upon a time, there was a"
NAMES = [f"p{index}" for index in range(8)]


@pytest.fixture(scope="module", params=["stories260k", "babyllama-tok105"])
def language_model(request: pytest.FixtureRequest, shared: Path) -> LanguageModel:
    return load_model(str(shared / "models" / request.param), dtype="float32")


def expected(language_model: LanguageModel) -> tuple[int, str]:
    """The number of tokens and the text of transformers' greedy continuation."""
    tokenizer = language_model.tokenizer
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        output = language_model.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS, pad_token_id=0
        )
    length = ids.shape[1]
    return output.shape[1] - length, text_of(language_model, output[0].tolist())[len(text_of(language_model, ids[0])) :]


def text_of(language_model: LanguageModel, ids: Any) -> str:
    return language_model.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def generate(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    body = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, **fields}
    response = client.post("/generate", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def streamed(client: httpx.Client) -> str:
    body = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "stream": True}
    with client.stream("POST", "/generate", json=body, timeout=120) as response:
        events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]
    return "".join(event.get("delta", "") for event in events)


def test_greedy_text_through_the_server_equals_transformers(language_model: LanguageModel, tmp_path: Path) -> None:
    """200 tokens: alone, streamed, and beside 15 requests steered by eight profiles at many strengths."""
    tokens, text = expected(language_model)
    save_profiles(tmp_path, language_model.identity, *NAMES, unit=0.2)
    engine = TorchEngine(language_model, EngineConfig(slots=16))
    with live_server(engine, tmp_path) as client, ThreadPoolExecutor(16) as pool:
        alone = generate(client)
        neighbours = [
            pool.submit(generate, client, profile=NAMES[i % 8], strength=(-1) ** i * (1 + i) / 10, max_tokens=150 + i)
            for i in range(15)
        ]
        among = pool.submit(generate, client)
        crowd = [neighbour.result() for neighbour in neighbours]
        assert alone["text"] == text == among.result()["text"] == streamed(client)
        assert alone["usage"]["completion_tokens"] == tokens == among.result()["usage"]["completion_tokens"]
        assert len({answer["text"] for answer in crowd} - {text}) == 15
        assert all(answer["steering"][0]["steered_tokens"] > 100 for answer in crowd)
    asyncio.run(engine.close())
