"""Steering that changes: schedules, a running generation's, in a header, and told without generating."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from server.engines.protocol import Delta, Finished, GenerationRequest, SamplingParameters, SteeringChange
from server.generation.steering_grammar import Schedule
from steering_vectors.data.chat import encode_prompt
from steering_vectors.errors import Conflict, SteeringError, UnknownGeneration
from steering_vectors.models.loading import load_model
from steering_vectors.profiles.files import load_profile, save_profile
from steering_vectors.profiles.mixture import Mixture, Term
from steering_vectors.profiles.profile import Profile
from tests.support.running import HeldEngine
from tests.support.serving import client_fixture, engine_fixture, profiles_fixture, until

LM = load_model("demo", dtype="float32")
PROMPT = encode_prompt(LM.tokenizer, "Bread is baked in")
GREEDY = SamplingParameters(temperature=0, max_tokens=24, ignore_eos=True)
engine = engine_fixture(slots=4)
profiles = profiles_fixture("warm", "concise", unit=60.0, calibration={"kl_at_1": 0.1}, residual_norms={1: 500.0})
client = client_fixture()


@pytest.fixture(scope="module")
def warm(profiles: Path) -> Profile:
    return load_profile(profiles / "warm.safetensors")


def mix(profile: Profile, strength: float, **options: Any) -> Mixture:
    return Mixture((Term(profile, strength),), **options)


@contextmanager
def shifted_by_position(timeline: Sequence[tuple[int, Mixture]]) -> Iterator[None]:
    """In passes over a whole text: each mix at the positions from its own to the next one's."""
    ends = [start for start, _ in timeline[1:]] + [10**6]

    def hook_for(layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = hidden.clone()
            for (start, mixture), end in zip(timeline, ends, strict=True):
                if layer in (shifts := mixture.shifts().by_layer()):
                    hidden[:, start:end] += shifts[layer]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    handles = [block.register_forward_hook(hook_for(layer)) for layer, block in enumerate(LM.blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def recomputed(timeline: Sequence[tuple[int, Mixture]], tokens: int = 24) -> list[int]:
    """Greedy tokens by whole passes without a cache; a mix that holds from token k steers from the position before."""
    where = [(max(len(PROMPT) - 1 + token, 0), mixture) for token, mixture in timeline]
    ids = list(PROMPT)
    for _ in range(tokens):
        with torch.no_grad(), shifted_by_position(where):
            logits = LM.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
    return ids[len(PROMPT) :]


async def written(
    engine: HeldEngine, request: GenerationRequest, at: int | None = None, change: Mixture | None = None
) -> tuple[list[int], Finished, SteeringChange | None]:
    """The tokens of a request whose steering is changed as soon as token `at` has come."""
    ids: list[int] = []
    acknowledged = None
    if at is not None:
        engine.hold(after=at + 1, until_change=True)
    async for event in engine.generate(request):
        if isinstance(event, Delta):
            ids += event.token_ids
            if at is not None and acknowledged is None and len(ids) > at:
                assert change is not None
                acknowledged = await engine.set_steering(request.id, change)
        elif isinstance(event, Finished):
            return ids, event, acknowledged
    raise AssertionError


@pytest.mark.parametrize(("before", "after"), [(0.0, 1.0), (1.0, -1.0), (1.0, 0.0)])
def test_a_changed_steering_holds_from_the_acknowledged_token_on(
    engine: HeldEngine, warm: Profile, before: float, after: float
) -> None:
    request = GenerationRequest("change", tuple(PROMPT), GREEDY, mix(warm, before))
    ids, end, change = asyncio.run(written(engine, request, 3, mix(warm, after)))
    assert change is not None
    assert 4 <= change.from_token < 24
    assert change.position == len(PROMPT) + change.from_token - 1
    assert ids == recomputed([(0, mix(warm, before)), (change.from_token, mix(warm, after))])
    assert ids != recomputed([(0, mix(warm, before))])
    assert [segment.from_token for segment in end.segments] == [0, change.from_token]
    counts = (change.from_token if before else 0, 24 - change.from_token if after else 0)
    assert tuple(segment.steered_tokens for segment in end.segments) == counts


def test_a_schedule_equals_a_recomputation(engine: HeldEngine, warm: Profile) -> None:
    schedule = ((5, mix(warm, 1.0)), (6, mix(warm, -0.5)), (15, mix(warm, 0.0)))
    request = GenerationRequest("plan", tuple(PROMPT), GREEDY, mix(warm, 0.2), schedule=schedule)
    ids, end, _ = asyncio.run(written(engine, request))
    assert ids == recomputed([(0, mix(warm, 0.2)), *schedule])
    assert [segment.from_token for segment in end.segments] == [0, 5, 6, 15]
    assert [segment.steered_tokens for segment in end.segments] == [5, 1, 9, 0]


def test_a_change_ends_what_was_scheduled(engine: HeldEngine, warm: Profile) -> None:
    request = GenerationRequest("both", tuple(PROMPT), GREEDY, mix(warm, 0.2), schedule=((20, mix(warm, 1.0)),))
    ids, end, change = asyncio.run(written(engine, request, 2, mix(warm, -1.0)))
    assert change is not None
    assert ids == recomputed([(0, mix(warm, 0.2)), (change.from_token, mix(warm, -1.0))])
    assert len(end.segments) == 2


def test_the_whole_prompt_of_a_waiting_request_is_under_the_changed_steering(engine: HeldEngine, warm: Profile) -> None:
    async def run() -> tuple[list[int], Finished]:
        engine.hold()
        first = engine.generate(GenerationRequest("first", (5, 6, 7), GREEDY))
        await asyncio.to_thread(engine.until_held)  # from now on requests wait
        stream = engine.generate(GenerationRequest("waiting", tuple(PROMPT), GREEDY, mix(warm, 1.0)))
        changed = engine.set_steering("waiting", mix(warm, -1.0))
        engine.go()
        change = await changed
        assert (change.from_token, change.position) == (0, 0)
        await first.aclose()
        ids: list[int] = []
        async for event in stream:
            if isinstance(event, Finished):
                return ids, event
            assert isinstance(event, Delta)
            ids += event.token_ids
        raise AssertionError(change)

    ids, end = asyncio.run(run())
    assert [segment.from_token for segment in end.segments] == [0]
    assert ids == recomputed([(0, mix(warm, -1.0))])


def test_neighbours_of_a_changed_row_stay_as_they_are(engine: HeldEngine, warm: Profile) -> None:
    async def run() -> list[Any]:
        requests = [GenerationRequest(f"row-{i}", tuple(PROMPT), GREEDY, mix(warm, (0.0, 0.5)[i % 2])) for i in (0, 1)]
        changed = GenerationRequest("row-2", tuple(PROMPT), GREEDY, mix(warm, 0.5))
        return await asyncio.gather(
            *(written(engine, one) for one in requests), written(engine, changed, 2, mix(warm, -1.0))
        )

    plain, steered, _ = asyncio.run(run())
    assert plain[0] == recomputed([(0, Mixture())])
    assert steered[0] == recomputed([(0, mix(warm, 0.5))])


def test_what_is_not_running_cannot_be_changed(engine: HeldEngine, warm: Profile) -> None:
    async def run() -> None:
        await written(engine, GenerationRequest("over", tuple(PROMPT), GREEDY))
        with pytest.raises(Conflict, match="generation 'over' has ended"):
            await engine.set_steering("over", mix(warm, 1.0))
        with pytest.raises(UnknownGeneration, match="there is no generation 'never'"):
            await engine.set_steering("never", mix(warm, 1.0))

    asyncio.run(run())


def test_a_running_stream_is_changed_over_http(client: httpx.Client, engine: HeldEngine) -> None:
    body = {"prompt": "Bread is", "max_tokens": 20, "ignore_eos": True, "profile": "warm", "stream": True}
    engine.hold(after=3, until_change=True)
    with client.stream("POST", "/generate", json=body) as stream:
        lines = (json.loads(line[6:]) for line in stream.iter_lines() if line)
        name = next(lines)["id"]
        engine.until_held()
        answer = client.patch(f"/generations/{name}", json={"steering": "concise@-0.5"})
        assert answer.status_code == 200, answer.text
        *_, last = lines
    first = answer.json()["from_token"]
    assert answer.json()["id"] == name
    assert [one["name"] for one in answer.json()["steering"]] == ["concise"]
    warm, concise = last["steering"]
    assert warm["timeline"] == [{"from_token": 0, "strength": 1.0}, {"from_token": first, "strength": 0.0}]
    assert concise["timeline"] == [{"from_token": 0, "strength": 0.0}, {"from_token": first, "strength": -0.5}]
    assert 3 < first < 20
    assert (warm["steered_tokens"], concise["steered_tokens"]) == (first, 20 - first)
    assert (warm["strength"], concise["strength"]) == (0.0, -0.5)
    late = client.patch(f"/generations/{name}", json={"steering": "warm"})
    assert (late.status_code, late.json()["error"]["code"]) == (409, "conflict")
    wrong = client.patch("/generations/gen-0", json={"steering": "warm"})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (404, "generation_not_found")
    beyond = client.patch(f"/generations/{name}", json={"steering": "warm@9"})
    assert (beyond.status_code, beyond.json()["error"]["code"]) == (400, "strength_out_of_range")


def test_a_schedule_in_a_request_and_its_receipt(client: httpx.Client) -> None:
    points = [{"from_token": 0, "strength": 0.0}, {"from_token": 4, "strength": 1.0}]
    term = {"name": "warm", "schedule": points, "interpolation": "linear"}
    body = {"model": "demo", "prompt": "Bread is", "max_tokens": 8, "ignore_eos": True, "seed": 1}
    whole = client.post("/v1/completions", json={**body, "steering": {"profiles": [term]}}).json()
    (entry,) = whole["steering"]
    expected = [{"from_token": token, "strength": token / 4} for token in range(5)]
    assert entry["timeline"] == expected
    assert (entry["strength"], entry["steered_tokens"]) == (1.0, 7)
    short = client.post("/v1/completions", json={**body, "max_tokens": 2, "steering": {"profiles": [term]}}).json()
    assert short["steering"][0]["timeline"] == expected[:2]


def test_schedules_are_read_strictly() -> None:
    line = Schedule(((0, 0.0), (10, 1.0), (20, -1.0)), linear=True)
    assert [line.at(token) for token in (0, 5, 10, 15, 20, 99)] == [0.0, 0.5, 1.0, 0.0, -1.0, -1.0]
    steps = Schedule(((0, 0.0), (10, 1.0)))
    assert [steps.at(token) for token in (0, 9, 10, 11)] == [0.0, 0.0, 1.0, 1.0]
    assert steps.changes() == [0, 10]
    assert all(later == earlier + 1 for earlier, later in pairwise(line.changes()))
    assert Schedule(((0, 0.0), (4096, 1.0)), linear=True).changes()[-1] == 4096
    for points in ((), ((1, 0.5),), ((0, 0.5), (0, 0.6)), ((0, 0.1), (4097, 1.0))):
        with pytest.raises(SteeringError, match="schedule"):
            Schedule(points)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/generate", "/score"])
def test_a_header_steers_clients_that_cannot_add_fields(client: httpx.Client, path: str) -> None:
    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]} if "chat" in path else {"prompt": "Hi"}
    more = {"completions": [" there"]} if "score" in path else {"max_tokens": 3}
    body = {**prompt, **more, **({"model": "demo"} if "v1" in path else {})}
    header = {"x-trimtab-steering": "warm@0.5+concise@-0.25"}
    told = client.post(path, json=body, headers=header).json()["steering"]
    assert [(one["name"], one["strength"]) for one in told] == [("warm", 0.5), ("concise", -0.25)]
    twice = client.post(path, json={**body, "steering": "warm"}, headers=header)
    assert (twice.status_code, twice.json()["error"]["param"]) == (400, "steering")
    unreadable = client.post(path, json=body, headers={"x-trimtab-steering": "warm@@"})
    assert (unreadable.status_code, unreadable.json()["error"]["code"]) == (400, "invalid_steering")


def test_what_a_steering_would_do(client: httpx.Client, warm: Profile) -> None:
    told = client.post("/steering/resolve", json={"steering": "warm@-0.5"}).json()
    (entry,) = told["steering"]
    assert (entry["name"], entry["version"], entry["strength"]) == ("warm", warm.version, -0.5)
    assert (entry["unit"], entry["max_strength"], entry["kl_at_1"]) == (60.0, warm.max_strength, 0.1)
    assert [one["block"] for one in told["blocks"]] == list(warm.layers)
    first = told["blocks"][0]
    assert first["shift_norm"] == pytest.approx(30.0 * float(warm.directions[1].norm()), rel=1e-5)
    assert first["norm_ratio"] == pytest.approx(first["shift_norm"] / 500.0)
    assert told["blocks"][1]["norm_ratio"] is None
    unknown = client.post("/steering/resolve", json={"steering": "nobody"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "profile_not_found")


@pytest.mark.parametrize("path", ["/steering/resolve", "/generate"])
def test_a_sum_that_overflows_is_refused(client: httpx.Client, profiles: Path, path: str) -> None:
    """Either profile alone is within the model's dtype, float32."""
    for name in ("huge", "vast"):
        directions = {1: torch.ones(LM.hidden_size)}
        save_profile(Profile(name, LM.identity, directions, "made", unit=2e38), profiles)
        until(lambda name=name: client.get(f"/profiles/{name}").status_code == 200)
    body = {} if path == "/steering/resolve" else {"prompt": "Bread is", "max_tokens": 1}
    for steering in ("huge", "vast", "huge@1+vast@0.5", "huge@1+vast@-1"):
        assert client.post(path, json={**body, "steering": steering}).status_code != 400, steering
    for steering in ("huge@1+vast@1", "huge@-1+vast@-1"):
        refused = client.post(path, json={**body, "steering": steering})
        assert refused.status_code == 400, refused.text
        assert refused.json()["error"]["message"] == "the shift overflows the model's dtype: use a smaller strength"


def test_the_responses_api_names_what_to_use(client: httpx.Client) -> None:
    for method, path in (("POST", "/v1/responses"), ("GET", "/v1/responses/resp_1")):
        answer = client.request(method, path, json={} if method == "POST" else None)
        assert answer.status_code == 404
        assert "use POST /v1/chat/completions" in answer.json()["error"]["message"]
