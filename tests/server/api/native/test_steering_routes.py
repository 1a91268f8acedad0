"""Steering that changes: schedules, a running generation's, in a header, and told without generating."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from server.engines.errors import Conflict, UnknownGeneration
from server.engines.protocol import (
    Delta,
    Finished,
    GenerationRequest,
    SamplingParameters,
    SteeringChange,
    SteeringPlan,
    StrengthSchedule,
)
from steering_vectors.data.chat import encode_prompt
from steering_vectors.errors import SteeringError
from steering_vectors.models.loading import load_model
from steering_vectors.profiles.files import load_profile, save_profile
from steering_vectors.profiles.mixture import Mixture, Term
from steering_vectors.profiles.profile import Profile
from tests.support.running import HeldEngine, load, plan, request, steps, submit
from tests.support.serving import client_fixture, engine_fixture, profiles_fixture, until

pytestmark = pytest.mark.slow

LM = load_model("demo", dtype="float32")
PROMPT = encode_prompt(LM.tokenizer, "Bread is baked in")
GREEDY = SamplingParameters(temperature=0, max_tokens=24, ignore_eos=True)
engine = engine_fixture(slots=4)
profiles = profiles_fixture("warm", "concise", unit=60.0, calibration={"kl_at_1": 0.1}, residual_norms={1: 500.0})
client = client_fixture()


@pytest.fixture(scope="module")
def warm(profiles: Path) -> Profile:
    return load_profile(profiles / "warm.safetensors")


def mix(profile: Profile, strength: float) -> Mixture:
    return Mixture((Term(profile, strength),))


def asked(plan: SteeringPlan) -> GenerationRequest:
    return replace(request(PROMPT, plan), sampling=GREEDY)


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
    engine: HeldEngine, request: GenerationRequest, at: int | None = None, change: SteeringPlan | None = None
) -> tuple[list[int], Finished, SteeringChange | None]:
    """The tokens of a request whose steering is changed as soon as token `at` has come."""
    ids: list[int] = []
    acknowledged = None
    if at is not None:
        engine.hold(after=at + 1, of=request.ids[0], until_change=True)
    async for event in await submit(engine, request):
        if isinstance(event, Delta):
            ids += event.token_ids
            if at is not None and acknowledged is None and len(ids) > at:
                assert change is not None
                acknowledged = await engine.set_steering(request.ids[0], change)
        elif isinstance(event, Finished):
            return ids, event, acknowledged
    raise AssertionError


@pytest.mark.parametrize(("before", "after"), [(0.0, 1.0), (1.0, -1.0), (1.0, 0.0)])
def test_a_changed_steering_holds_from_the_acknowledged_token_on(
    engine: HeldEngine, warm: Profile, before: float, after: float
) -> None:
    ids, end, change = asyncio.run(written(engine, asked(plan(warm, before)), 3, plan(warm, after)))
    assert change is not None
    assert 4 <= change.from_token < 24
    assert change.position == len(PROMPT) + change.from_token - 1
    assert ids == recomputed([(0, mix(warm, before)), (change.from_token, mix(warm, after))])
    assert ids != recomputed([(0, mix(warm, before))])
    assert [segment.from_token for segment in end.segments] == [0, change.from_token]
    counts = (change.from_token if before else 0, 24 - change.from_token if after else 0)
    assert tuple(segment.terms[0].steered_tokens for segment in end.segments) == counts


def test_a_schedule_equals_a_recomputation(engine: HeldEngine, warm: Profile) -> None:
    points = ((0, 0.2), (5, 1.0), (6, -0.5), (15, 0.0))
    ids, end, _ = asyncio.run(written(engine, asked(plan(warm, steps(*points)))))
    assert ids == recomputed([(token, mix(warm, strength)) for token, strength in points])
    (segment,) = end.segments
    assert segment.plan.changes(24) == [0, 5, 6, 15]
    assert segment.terms[0].steered_tokens == 15


def test_a_straight_schedule_equals_a_recomputation(engine: HeldEngine, warm: Profile) -> None:
    line = StrengthSchedule(((0, -0.5), (10, 1.0)), "linear")
    ids, _, _ = asyncio.run(written(engine, asked(plan(warm, line))))
    assert ids == recomputed([(token, mix(warm, -0.5 + 0.15 * token)) for token in range(11)])


def test_a_change_ends_what_was_scheduled(engine: HeldEngine, warm: Profile) -> None:
    before = plan(warm, steps((0, 0.2), (20, 1.0)))
    ids, end, change = asyncio.run(written(engine, asked(before), 2, plan(warm, -1.0)))
    assert change is not None
    assert ids == recomputed([(0, mix(warm, 0.2)), (change.from_token, mix(warm, -1.0))])
    assert len(end.segments) == 2


@pytest.mark.parametrize("interpolation", ["step", "linear"])
def test_a_change_may_be_a_schedule_that_counts_from_its_own_first_token(
    engine: HeldEngine, warm: Profile, interpolation: Any
) -> None:
    schedule = StrengthSchedule(((0, -1.0), (2, 1.0), (4, 0.0)), interpolation)
    ids, end, change = asyncio.run(written(engine, asked(plan(warm, 0.2)), 2, plan(warm, schedule)))
    assert change is not None
    first = change.from_token
    later = [(first + token, mix(warm, schedule.at(token))) for token in range(5)]
    assert ids == recomputed([(0, mix(warm, 0.2)), *later])
    assert [segment.from_token for segment in end.segments] == [0, first]
    assert change.segment.plan.terms[0].schedule == schedule


def test_the_whole_prompt_of_a_waiting_request_is_under_the_changed_steering(engine: HeldEngine, warm: Profile) -> None:
    async def run() -> tuple[list[int], Finished]:
        await load(engine, plan(warm).versions)
        engine.hold()
        first, waiting = asked(SteeringPlan()), asked(plan(warm, 1.0))
        busy = await submit(engine, first)
        await asyncio.to_thread(engine.until_held)  # from now on requests wait
        stream = await submit(engine, waiting)
        changing = asyncio.create_task(engine.set_steering(waiting.ids[0], plan(warm, -1.0)))
        while engine._commands.qsize() < 2:  # the request and its change
            await asyncio.sleep(0.001)
        engine.go()
        change = await changing
        assert (change.from_token, change.position) == (0, 0)
        await busy.aclose()
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
        requests = [asked(plan(warm, strength)) for strength in (0.0, 0.5)]
        changed = asked(plan(warm, 0.5))
        return await asyncio.gather(
            *(written(engine, one) for one in requests), written(engine, changed, 2, plan(warm, -1.0))
        )

    plain, steered, _ = asyncio.run(run())
    assert plain[0] == recomputed([(0, Mixture())])
    assert steered[0] == recomputed([(0, mix(warm, 0.5))])


def test_what_is_not_running_cannot_be_changed(engine: HeldEngine, warm: Profile) -> None:
    async def run() -> None:
        over = asked(plan(warm))
        await written(engine, over)
        with pytest.raises(Conflict, match=f"generation '{over.ids[0]}' has ended"):
            await engine.set_steering(over.ids[0], plan(warm))
        with pytest.raises(UnknownGeneration, match="there is no generation 'never'"):
            await engine.set_steering("never", plan(warm))

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
    line = StrengthSchedule(((0, 0.0), (10, 1.0), (20, -1.0)), "linear")
    assert [line.at(token) for token in (0, 5, 10, 15, 20, 99)] == [0.0, 0.5, 1.0, 0.0, -1.0, -1.0]
    step = StrengthSchedule(((0, 0.0), (10, 1.0)))
    assert [step.at(token) for token in (0, 9, 10, 11)] == [0.0, 0.0, 1.0, 1.0]
    assert StrengthSchedule(((0, 0.0), (4096, 1.0)), "linear").at(4096) == 1.0
    for points in ((), ((1, 0.5),), ((0, 0.5), (0, 0.6)), ((0, 0.1), (4097, 1.0))):
        with pytest.raises(SteeringError, match="schedule"):
            StrengthSchedule(points)


def test_a_running_stream_is_changed_by_a_schedule_over_http(client: httpx.Client) -> None:
    """Its tokens count from the change; each strength stands in the receipt from the token it held from."""
    body = {"prompt": "Bread is", "max_tokens": 200, "ignore_eos": True, "profile": "warm", "stream": True}
    points = [{"from_token": 0, "strength": 0.5}, {"from_token": 4, "strength": -0.5}]
    with client.stream("POST", "/generate", json=body) as stream:
        lines = (json.loads(line[6:]) for line in stream.iter_lines() if line)
        name = next(lines)["id"]
        next(lines)
        steering = {"profiles": [{"name": "warm", "schedule": points}]}
        answer = client.patch(f"/generations/{name}", json={"steering": steering})
        assert answer.status_code == 200, answer.text
        *_, last = lines
    first = answer.json()["from_token"]
    (entry,) = last["steering"]
    assert entry["timeline"] == [
        {"from_token": 0, "strength": 1.0},
        {"from_token": first, "strength": 0.5},
        {"from_token": first + 4, "strength": -0.5},
    ]
    beyond = {
        "profiles": [{"name": "warm", "schedule": [{"from_token": 0, "strength": 0}, {"from_token": 9, "strength": 9}]}]
    }
    refused = client.patch(f"/generations/{name}", json={"steering": beyond}).json()["error"]
    assert (refused["param"], refused["code"]) == ("strength", "strength_out_of_range")


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
    assert (entry["unit"], entry["kl_at_1"]) == (60.0, 0.1)
    assert (entry["min_strength"], entry["max_strength"]) == (-warm.max_strength, warm.max_strength)
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
