"""Is the steering acting? The residual stream's projection on each direction, token by token."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from server.engines.torch.sampling.projections import projection
from steering_vectors.data.chat import encode_prompt
from steering_vectors.models.hooks import record
from steering_vectors.models.loading import load_model
from steering_vectors.profiles.files import load_profile
from steering_vectors.profiles.profile import ModelIdentity, Profile
from tests.support.by_hand import shifted
from tests.support.serving import client_fixture, engine_fixture, profiles_fixture

LM = load_model("demo", dtype="float32")
PROMPT = encode_prompt(LM.tokenizer, "Bread is")
ASKED: dict[str, Any] = {"prompt": "Bread is", "max_tokens": 6, "ignore_eos": True, "temperature": 0}
engine = engine_fixture(slots=4)
profiles = profiles_fixture("warm", "concise", unit=5.0)
client = client_fixture()


@pytest.fixture(scope="module")
def pair(profiles: Path) -> list[Profile]:
    return [load_profile(profiles / f"{name}.safetensors") for name in ("warm", "concise")]


def expected(profile: Profile, steering: Profile, strength: float, tokens: int) -> list[float]:
    """By plain passes over a greedy text, the shift added by hand."""
    shifts = {layer: strength * steering.unit * shift for layer, shift in steering.injected().items()}
    ids, found = list(PROMPT), []
    for _ in range(tokens):
        with torch.no_grad(), shifted(LM, shifts, len(PROMPT) - 1), record(LM.blocks, profile.layers) as outputs:
            logits = LM.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        values = [outputs[layer][0, -1] @ d / (profile.unit * (d @ d)) for layer, d in profile.directions.items()]
        found.append(float(torch.stack(values).mean()))
        ids.append(int(logits.argmax()))
    return found


@pytest.mark.slow
def test_projections_equal_plain_passes(client: httpx.Client, pair: Sequence[Profile]) -> None:
    warm, concise = pair
    body = {**ASKED, "variants": ["warm@0.5", "concise@-0.5"], "projections": True}
    first, second = client.post("/compare", json=body).json()["variants"]
    for profile in pair:
        told = first["projections"][profile.name]
        assert told == pytest.approx(expected(profile, warm, 0.5, 6), abs=1e-4)
        assert second["projections"][profile.name] == pytest.approx(expected(profile, concise, -0.5, 6), abs=1e-4)


def test_strength_is_added_where_there_is_one_block(pair: Sequence[Profile]) -> None:
    d = pair[0].directions[1]
    single = Profile("one", LM.identity, {1: d}, "random", unit=5.0)
    h = torch.randn(len(d), generator=torch.Generator().manual_seed(0))
    before = projection(single, {1: h})
    assert projection(single, {1: h + 0.8 * 5.0 * d}) == pytest.approx(before + 0.8, abs=1e-5)


IDENTITY = ModelIdentity("plain", "test", hidden_size=3, num_layers=8, fingerprint="none")


def plain(directions: Mapping[int, Sequence[float]], **fields: Any) -> Profile:
    tensors = {layer: torch.tensor(direction, dtype=torch.float32) for layer, direction in directions.items()}
    return Profile("plain", IDENTITY, tensors, "by hand", **fields)


def at(profile: Profile, residuals: Mapping[int, Sequence[float]]) -> float:
    return projection(profile, {layer: torch.tensor(values) for layer, values in residuals.items()})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (12 / 25 + 3 / 9) / 2),  # unit 1
        ({"unit": 4.0}, (12 / 25 + 3 / 9) / 2 / 4),
        ({"unit": 0.25}, (12 / 25 + 3 / 9) / 2 * 4),
        ({"unit": 4.0, "layering": "incremental"}, (12 / 25 + 3 / 9) / 2 / 4),  # of directions as they are stored
        ({"unit": 4.0, "operator": "ablate"}, (12 / 25 + 3 / 9) / 2),  # whatever the unit
        ({"unit": 0.25, "operator": "ablate"}, (12 / 25 + 3 / 9) / 2),
    ],
    ids=str,
)
def test_the_mean_over_blocks_in_units_of_strength(fields: dict[str, Any], expected: float) -> None:
    profile = plain({2: [3.0, 4.0, 0.0], 5: [1.0, 2.0, -2.0]}, **fields)
    residuals = {2: [0.0, 3.0, 9.0], 5: [1.0, 2.0, 1.0], 6: [99.0, 99.0, 99.0]}  # block 6 has no direction
    found = at(profile, residuals)
    assert type(found) is float
    assert found == pytest.approx(expected, rel=1e-12)


def test_an_opposite_residual_has_a_negative_projection() -> None:
    assert at(plain({0: [3.0, 4.0, 0.0]}), {0: [-6.0, -8.0, 1.0]}) == -2.0


@pytest.mark.parametrize("size", [0.5, 1e-3, 1e-5])
def test_short_directions_are_not_rounded_up(size: float) -> None:
    d = torch.tensor([size, 0.0, 0.0]).double()
    assert at(plain({0: d.tolist()}), {0: [7.0, 1.0, 1.0]}) == pytest.approx(7.0 / float(d[0]), rel=1e-12)


def test_a_direction_without_length_is_divided_by_a_small_number() -> None:
    assert at(plain({0: [0.0, 0.0, 0.0]}), {0: [7.0, 1.0, 1.0]}) == 0.0
    tiny = float(torch.tensor(1e-8))  # its square is below 1e-12
    assert at(plain({0: [tiny, 0.0, 0.0]}, unit=2.0), {0: [7.0, 1.0, 1.0]}) == pytest.approx(
        7 * tiny / 2e-12, rel=1e-12
    )


def test_products_are_summed_in_float64() -> None:
    assert at(plain({0: [1.0, 1.0, 1.0]}), {0: [2.0**30, 3.0, -(2.0**30)]}) == 1.0
    assert at(plain({0: [4096.0, 1.0, 0.0]}), {0: [4096.0, 1.0, 0.0]}) == 1.0
    assert at(plain({0: [4096.0, 1.0, 0.0]}), {0: [1.0, 0.0, 0.0]}) == pytest.approx(4096 / (2**24 + 1), rel=1e-14)


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_streams_tell_them_with_their_tokens(client: httpx.Client, pair: Sequence[Profile], path: str) -> None:
    body = {**ASKED, "steering": "warm@0.5", "projections": True, **({"model": "demo"} if "v1" in path else {})}
    answer = client.post(path, json=body).json()
    whole = answer["projections"] if path == "/generate" else answer["choices"][0]["projections"]
    frames = client.post(path, json={**body, "stream": True}).text.split("\n\n")
    events = [json.loads(one.removeprefix("data: ")) for one in frames if one and "[DONE]" not in one]
    parts = [event if path == "/generate" else event["choices"][0] for event in events]
    streamed = [value for part in parts for value in part.get("projections", {}).get("warm", [])]
    assert streamed == pytest.approx(whole["warm"], abs=1e-5)
    assert whole["warm"] == pytest.approx(expected(pair[0], pair[0], 0.5, 6), abs=1e-4)


def test_neighbours_that_do_not_ask_are_told_nothing(client: httpx.Client) -> None:
    assert "projections" not in client.post("/generate", json={**ASKED, "steering": "warm@0.5"}).json()
    assert client.post("/generate", json={**ASKED, "projections": True}).json().get("projections", {}) == {}
