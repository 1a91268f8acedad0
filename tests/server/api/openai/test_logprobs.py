"""Log-probabilities over HTTP: equal to a plain forward pass, whole and streamed, of what is written and of prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from server.api.openai.responses import CompletionLogprobs, chat_logprobs
from server.engines.protocol import TokenLogprob
from server.engines.torch.engine import TorchEngine
from server.generation.token_texts import TokenTexts
from steering_vectors.data.chat import Message, encode_prompt
from steering_vectors.models.loading import load_model
from steering_vectors.profiles.files import load_profile
from tests.support.by_hand import shifted
from tests.support.serving import client_fixture, engine_fixture, profiles_fixture
from tests.support.tiny_tokenizers import byte_fallback_tokenizer, tiny_tokenizer

MESSAGES: list[Any] = [{"role": "user", "content": "How do I bake bread?"}]
TEXT = "Bread is baked in an oven — ça va, 麦 🍞."
LM = load_model("demo", dtype="float32")
engine = engine_fixture(slots=4, prefill_chunk=16)
profiles = profiles_fixture("warm", unit=10.0, calibration={"kl_at_1": 0.1})
client = client_fixture()


@pytest.fixture
def sdk(client: httpx.Client) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)


def reference(ids: Sequence[int], shifts: dict[int, torch.Tensor] | None = None) -> torch.Tensor:
    """log P of each token but the first, by a plain forward pass: `[tokens - 1, vocabulary]`."""
    with torch.no_grad(), shifted(LM, shifts or {}, 0):
        logits = LM.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, :-1]
    return logits.double().log_softmax(-1)


def written_ids(tokens: Sequence[Any]) -> list[int]:
    """Ids of tokens by their bytes: the demo's tokens are all different."""
    by_bytes = {TokenTexts(LM.tokenizer).bytes_of(one): one for one in range(LM.vocab_size)}
    return [by_bytes[bytes(token.bytes)] for token in tokens]


@pytest.mark.slow
def test_greedy_logprobs_equal_a_plain_forward_pass(sdk: openai.OpenAI) -> None:
    whole = sdk.chat.completions.create(
        model="demo", messages=MESSAGES, temperature=0, max_tokens=12, logprobs=True, top_logprobs=3
    )
    choice = whole.choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    tokens = choice.logprobs.content
    prompt = encode_prompt(LM.tokenizer, [Message("user", MESSAGES[0]["content"])])
    ids = written_ids(tokens)
    expected = reference([*prompt, *ids])[len(prompt) - 1 :]
    assert len(tokens) == whole.usage.completion_tokens == 12  # type: ignore[union-attr]
    for token, token_id, row in zip(tokens, ids, expected, strict=True):
        assert token.logprob == pytest.approx(float(row[token_id]), abs=1e-4)
        values, best = row.topk(3)
        assert [one.logprob for one in token.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)
        assert written_ids(token.top_logprobs) == best.tolist()
    assert b"".join(bytes(token.bytes or []) for token in tokens).decode() == choice.message.content


def test_penalties_bias_and_temperature_do_not_show(sdk: openai.OpenAI) -> None:
    bent = sdk.chat.completions.create(
        model="demo", messages=MESSAGES, seed=3, temperature=1.5, max_tokens=8, logprobs=True, presence_penalty=1.5,
        logit_bias={"300": 5},
    )  # fmt: skip
    tokens = bent.choices[0].logprobs.content  # type: ignore[union-attr]
    prompt = encode_prompt(LM.tokenizer, [Message("user", MESSAGES[0]["content"])])
    ids = written_ids(tokens)  # type: ignore[arg-type]
    expected = reference([*prompt, *ids])[len(prompt) - 1 :]
    found = [token.logprob for token in tokens or []]
    assert found == pytest.approx([float(row[one]) for row, one in zip(expected, ids, strict=True)], abs=1e-4)


@pytest.mark.parametrize("steering", [None, "warm@0.5"])
def test_an_echoed_prompt_is_scored_under_its_steering(
    sdk: openai.OpenAI, profiles: Path, steering: str | None
) -> None:
    model = "demo" if steering is None else f"demo:{steering}"
    whole = sdk.completions.create(model=model, prompt=TEXT, max_tokens=0, echo=True, logprobs=2)
    (choice,) = whole.choices
    shifts: dict[int, torch.Tensor] = {}
    if steering is not None:
        profile = load_profile(profiles / "warm.safetensors")
        shifts = {layer: 0.5 * profile.unit * shift for layer, shift in profile.injected().items()}
    ids = encode_prompt(LM.tokenizer, TEXT)
    expected = reference(ids, shifts)
    told = choice.logprobs
    assert told is not None
    assert told.token_logprobs is not None
    assert (choice.text, choice.finish_reason) == (TEXT, "length")
    assert told.token_logprobs[0] is None
    wanted = [float(row[one]) for row, one in zip(expected, ids[1:], strict=True)]
    assert told.token_logprobs[1:] == pytest.approx(wanted, abs=1e-4)
    assert told.top_logprobs is not None
    assert told.top_logprobs[0] is None
    best = [max(one.values()) for one in told.top_logprobs[1:]]
    assert best == pytest.approx(expected.amax(-1).tolist(), abs=1e-4)
    assert whole.usage.completion_tokens == 0  # type: ignore[union-attr]
    assert len(told.tokens or []) == whole.usage.prompt_tokens == len(ids)  # type: ignore[union-attr]
    steered = [one["steered_tokens"] for one in whole.model_extra["steering"]]  # type: ignore[index]
    assert steered == ([] if steering is None else [len(ids)])


def test_offsets_are_places_in_the_text(sdk: openai.OpenAI) -> None:
    (choice,) = sdk.completions.create(model="demo", prompt=TEXT, max_tokens=6, echo=True, logprobs=0, seed=1).choices
    told = choice.logprobs
    assert told is not None
    offsets, tokens = told.text_offset or [], told.tokens or []
    assert offsets == sorted(offsets)
    for token, start in zip(tokens, offsets, strict=True):
        if "\ufffd" not in token and token not in LM.tokenizer.all_special_tokens:
            assert choice.text[start : start + len(token)] == token


@pytest.mark.parametrize("echo", [True, False])
def test_a_stream_tells_what_the_whole_tells(client: httpx.Client, echo: bool) -> None:
    body = {"model": "demo", "prompt": [TEXT, "Bread"], "max_tokens": 5, "seed": 2, "echo": echo, "logprobs": 1, "n": 2}
    whole = client.post("/v1/completions", json=body).json()
    frames = client.post("/v1/completions", json={**body, "stream": True}).text.split("\n\n")
    chunks = [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]
    for choice in whole["choices"]:
        mine = [one["choices"][0] for one in chunks if one["choices"][0]["index"] == choice["index"]]
        assert "".join(one["text"] for one in mine) == choice["text"]
        told = [one["logprobs"] for one in mine if one["logprobs"] is not None]
        for name, values in choice["logprobs"].items():
            joined = [value for piece in told for value in piece[name]]
            if name in ("tokens", "text_offset"):
                assert joined == values
            elif name == "token_logprobs":
                assert joined[1:] == pytest.approx(values[1:], abs=1e-4)


@pytest.mark.parametrize("ending", [LM.tokenizer.eos_token_id, 301])
def test_the_token_that_ends_a_completion_is_told(client: httpx.Client, ending: int) -> None:
    """It is counted, so that clients who cut the prompt's part out of the list find each token in its place."""
    body = {"model": "demo", "prompt": TEXT, "max_tokens": 4, "temperature": 0, "echo": True, "logprobs": 1}
    body |= {"logit_bias": {str(ending): 100}, "stop_token_ids": [301]}
    whole = client.post("/v1/completions", json=body).json()
    (choice,) = whole["choices"]
    told = choice["logprobs"]
    ids = encode_prompt(LM.tokenizer, TEXT)
    expected = reference([*ids, ending])
    wanted = [float(row[one]) for row, one in zip(expected, [*ids[1:], ending], strict=True)]
    assert (choice["text"], choice["finish_reason"]) == (TEXT, "stop")
    assert told["token_logprobs"][1:] == pytest.approx(wanted, abs=1e-4)
    assert told["tokens"][-1] == TokenTexts(LM.tokenizer).text_of(ending)
    assert told["text_offset"][-1] == len(TEXT)
    assert len(told["tokens"]) == whole["usage"]["total_tokens"] == len(ids) + 1
    streamed = client.post("/v1/completions", json={**body, "stream": True}).text.split("\n\n")
    chunks = [json.loads(frame.removeprefix("data: "))["choices"][0] for frame in streamed[:-2]]
    pieces = [chunk["logprobs"]["tokens"] for chunk in chunks if chunk["logprobs"]]
    assert [token for piece in pieces for token in piece] == told["tokens"]


def test_echo_without_logprobs_repeats_the_prompt(client: httpx.Client) -> None:
    body = {"model": "demo", "prompt": [encode_prompt(LM.tokenizer, "Bread is")], "max_tokens": 3, "echo": True}
    whole = client.post("/v1/completions", json=body).json()
    assert whole["choices"][0]["text"].startswith("Bread is")
    assert whole["choices"][0]["logprobs"] is None
    streamed = client.post("/v1/completions", json={**body, "stream": True}).text
    assert json.loads(streamed.split("\n\n")[0].removeprefix("data: "))["choices"][0]["text"] == "Bread is"


def test_a_prompt_that_fills_the_context_can_be_scored(client: httpx.Client, engine: TorchEngine) -> None:
    ids = [300 + place % 50 for place in range(engine.info.context)]
    body = {"model": "demo", "prompt": ids, "echo": True, "logprobs": 0, "max_tokens": 0}
    told = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    expected = reference(ids)
    wanted = [float(row[one]) for row, one in zip(expected, ids[1:], strict=True)]
    assert told["token_logprobs"][1:] == pytest.approx(wanted, abs=1e-3)
    assert client.post("/v1/completions", json={**body, "max_tokens": 1}).status_code == 400


def test_tokens_that_are_no_text_have_bytes() -> None:
    for tokenizer in (tiny_tokenizer(), byte_fallback_tokenizer(), LM.tokenizer):
        texts = TokenTexts(tokenizer)
        ids = tokenizer("Ça va, 麦 🍞?", add_special_tokens=False)["input_ids"]
        assert b"".join(map(texts.bytes_of, ids)).decode().strip() == "Ça va, 麦 🍞?"
    assert texts.text_of(LM.tokenizer.eos_token_id) == LM.tokenizer.eos_token
    assert texts.bytes_of(LM.vocab_size + 7) == b""


def test_what_never_happens_is_still_json() -> None:
    texts = TokenTexts(LM.tokenizer)
    never = TokenLogprob(300, -math.inf, ((301, -0.5), (300, -math.inf)))
    assert chat_logprobs(texts, [never])["content"][0]["logprob"] == -9999
    told = CompletionLogprobs(texts).of([never], first=5)
    assert told["token_logprobs"] == [None, -9999]
    assert min(told["top_logprobs"][1].values()) == -9999
