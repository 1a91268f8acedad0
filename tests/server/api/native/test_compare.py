"""One prompt under several steerings, and given completions under one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from server.engines.torch.engine import TorchEngine
from steering_vectors.data.chat import Message, encode_prompt
from steering_vectors.models.loading import load_model
from steering_vectors.profiles.files import load_profile
from steering_vectors.profiles.profile import Profile
from tests.support.by_hand import shifted
from tests.support.serving import client_fixture, engine_fixture, profiles_fixture

LM = load_model("demo", dtype="float32")
MESSAGES = [{"role": "user", "content": "How do I bake bread?"}]
PROMPT = encode_prompt(LM.tokenizer, [Message("user", MESSAGES[0]["content"])])
VARIANTS = ["warm@0.5", {"profiles": []}, "warm@-0.5+concise@0.25"]
ASKED: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 12, "ignore_eos": True, "temperature": 0}
engine = engine_fixture(slots=4, prefill_chunk=8)
profiles = profiles_fixture("warm", "concise", unit=60.0)
client = client_fixture()


@pytest.fixture(scope="module")
def warm(profiles: Path) -> Profile:
    return load_profile(profiles / "warm.safetensors")


def log_probs(ids: Sequence[int], profile: Profile, strength: float, start: int) -> torch.Tensor:
    """Of every next token, by a plain pass with the shift added from a position on: `[tokens, vocabulary]`."""
    shifts = {layer: strength * profile.unit * shift for layer, shift in profile.injected().items()}
    with torch.no_grad(), shifted(LM, shifts, start):
        return LM.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].double().log_softmax(-1)


def events(client: httpx.Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    frames = client.post("/compare", json={**body, "stream": True}).text.split("\n\n")
    return [json.loads(frame.removeprefix("data: ")) for frame in frames if frame]


@pytest.mark.slow
def test_every_variant_is_what_it_is_alone(client: httpx.Client) -> None:
    together = client.post("/compare", json={**ASKED, "variants": VARIANTS}).json()["variants"]
    alone = [client.post("/generate", json={**ASKED, "steering": variant}).json() for variant in VARIANTS]
    assert [one["text"] for one in together] == [one["text"] for one in alone]
    assert [one["steering"] for one in together] == [one["steering"] for one in alone]
    assert len({one["text"] for one in together}) == 3


def test_a_stream_interleaves_the_variants(client: httpx.Client) -> None:
    body = {**ASKED, "variants": VARIANTS}
    whole = client.post("/compare", json=body).json()["variants"]
    told = events(client, body)
    assert [one["variant"] for one in told[:3]] == [0, 1, 2]
    for index, variant in enumerate(whole):
        mine = [one for one in told if one["variant"] == index]
        assert "".join(one.get("delta", "") for one in mine) == variant["text"]
        assert mine[-1]["finish_reason"] == "length"
        assert mine[-1]["steering"] == variant["steering"]
    first = [next(i for i, one in enumerate(told) if one["variant"] == v and one.get("delta")) for v in (0, 1, 2)]
    last = [max(i for i, one in enumerate(told) if one["variant"] == v and one.get("delta")) for v in (0, 1, 2)]
    assert max(first) < min(last)


def test_kl_equals_two_plain_passes_over_the_variants_text(client: httpx.Client, warm: Profile) -> None:
    body = {**ASKED, "variants": ["warm@0.5", {"profiles": []}], "kl": True}
    steered, plain = client.post("/compare", json=body).json()["variants"]
    assert len(steered["kl"]) == len(plain["kl"]) == 12
    assert max(plain["kl"]) < 1e-6
    ids = list(PROMPT)
    for found in steered["kl"]:
        one, base = (log_probs(ids, warm, strength, len(PROMPT) - 1)[-1] for strength in (0.5, 0.0))
        assert found == pytest.approx(float((one.exp() * (one - base)).sum()), abs=1e-4)
        ids.append(int(one.argmax()))
    assert LM.tokenizer.decode(ids[len(PROMPT) :], skip_special_tokens=True) == steered["text"]
    told = [one for event in events(client, body) if event["variant"] == 0 for one in event.get("kl", [])]
    assert told == pytest.approx(steered["kl"], abs=1e-5)


def test_shadows_leave_no_trace(client: httpx.Client, engine: TorchEngine) -> None:
    before = client.post("/generate", json=ASKED).json()["text"]
    client.post("/compare", json={**ASKED, "variants": VARIANTS, "kl": True})
    assert client.post("/generate", json=ASKED).json()["text"] == before
    assert engine.stats().running == 0


@pytest.mark.parametrize("steering", [None, "warm@0.5"])
def test_scores_equal_a_plain_pass(client: httpx.Client, warm: Profile, steering: str | None) -> None:
    completions = [
        " Mix flour and water.",
        "Bake it — ça va 🍞.",
        LM.tokenizer(" Warm", add_special_tokens=False).input_ids,
    ]
    body = {"messages": MESSAGES, "completions": completions, "steering": steering, "top_logprobs": 2}
    answer = client.post("/score", json=body).json()
    for completion, score in zip(completions, answer["scores"], strict=True):
        ids = score["token_ids"]
        strength = 0.0 if steering is None else 0.5
        rows = log_probs([*PROMPT, *ids], warm, strength, len(PROMPT) - 1)[len(PROMPT) - 1 : -1]
        wanted = [float(row[one]) for row, one in zip(rows, ids, strict=True)]
        assert score["token_logprobs"] == pytest.approx(wanted, abs=1e-4)
        assert score["sum"] == pytest.approx(sum(wanted), abs=1e-3)
        text = completion if isinstance(completion, str) else LM.tokenizer.decode(completion)
        assert LM.tokenizer.decode(ids) == text
        assert [one[0]["logprob"] for one in score["top_logprobs"]] == pytest.approx(rows.amax(-1).tolist(), abs=1e-4)
    assert [one["strength"] for one in answer["steering"]] == ([] if steering is None else [0.5])


@pytest.mark.slow
def test_a_thousand_scores_are_what_a_few_are(client: httpx.Client) -> None:
    texts = [f" {number} loaves" for number in range(400)]
    many = client.post("/score", json={"prompt": "We bake", "completions": texts}).json()["scores"]
    few = client.post("/score", json={"prompt": "We bake", "completions": texts[123:126]}).json()["scores"]
    assert [one["sum"] for one in many[123:126]] == pytest.approx([one["sum"] for one in few], abs=1e-4)


def test_a_prompt_is_prefilled_once_for_all_its_completions(client: httpx.Client, engine: TorchEngine) -> None:
    prompt = list(range(40, 72))
    completions = [[number, 9, 8] for number in range(10, 22)]
    before = engine.stats()
    answer = client.post("/score", json={"prompt": prompt, "completions": completions, "steering": "warm@0.5"}).json()
    after = engine.stats()
    rest = len(completions) * (1 + 3)  # the prompt's last token is steered, and predicts
    assert after.prompt_tokens - before.prompt_tokens == len(prompt) - 1 + rest
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == (len(prompt) - 1) * (len(completions) - 1)
