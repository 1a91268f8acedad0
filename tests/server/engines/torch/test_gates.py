"""Gates: a profile steers only where the prompt opens it, row by row in a mixed batch."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from server.engines.protocol import Delta, Finished, SamplingParameters, SteeringPlan
from server.engines.torch.engine import TorchEngine
from steering_vectors.data.chat import Message, Prompt, encode_prompt
from steering_vectors.data.sources import DEMO_DIRECTORY
from steering_vectors.errors import DataError, ProfileError, SteeringError
from steering_vectors.fitting.gates import GatePrompts, f1_score, fit_gate, load_gate_prompts
from steering_vectors.models.hooks import record
from steering_vectors.models.loading import LanguageModel, load_model
from steering_vectors.profiles.files import save_profile
from steering_vectors.profiles.gate import Gate, similarities
from steering_vectors.profiles.profile import Profile
from steering_vectors.steering.generate import steer
from tests.support.running import HeldEngine, load, outcome, plan, request, steps, submit, versioned
from tests.support.serving import demo_engine, live_server, random_profile

LM = load_model("demo", dtype="float32")
KITCHEN = ("bread", "cake", "coffee", "knife", "vegetable")
STUDY = ("language", "guitar", "exam", "speech", "letter")
GREEDY = SamplingParameters(temperature=0, max_tokens=8, ignore_eos=True)


def demo_prompts(file: str, words: Sequence[str]) -> tuple[Prompt, ...]:
    """The demo's questions that hold one of the words, each once."""
    rows = (json.loads(line) for line in (DEMO_DIRECTORY / file).read_text().splitlines())
    asked = dict.fromkeys(tuple(Message(**one) for one in row["prompt"]) for row in rows)
    return tuple(prompt for prompt in asked if any(word in prompt[-1].content.lower() for word in words))


TOPICS = [demo_prompts("warm.train.jsonl", words) for words in (KITCHEN, STUDY)]
TRAIN = GatePrompts(*(tuple(one for place, one in enumerate(topic) if place % 4) for topic in TOPICS))
FRESH = GatePrompts(*(topic[::4] for topic in TOPICS))  # never shown to the fit


@pytest.fixture(scope="module")
def gate() -> Gate:
    return fit_gate(LM, TRAIN)


@pytest.fixture(scope="module")
def gated(gate: Gate) -> Profile:
    return versioned(replace(random_profile(LM.identity, "warm", unit=60.0), gate=gate))


@pytest.fixture(scope="module")
def engine() -> Iterator[TorchEngine]:
    with demo_engine(slots=4, prefill_chunk=16) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine: TorchEngine, gated: Profile, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    directory = tmp_path_factory.mktemp("profiles")
    save_profile(gated, directory)
    save_profile(random_profile(LM.identity, "plain", seed=3, unit=60.0), directory)
    with live_server(engine, directory) as client:
        yield client


def similarity(lm: LanguageModel, gate: Gate, ids: Sequence[int]) -> float:
    """By a plain pass over the prompt but its last token."""
    with torch.no_grad(), record(lm.blocks, [gate.layer]) as outputs:
        lm.model(input_ids=torch.tensor([list(ids[:-1])]), use_cache=False)
    mean = outputs[gate.layer][0].mean(0)
    unit = gate.direction / gate.direction.norm()
    return float(torch.cosine_similarity(mean, torch.tanh(unit * (unit @ mean)), dim=0))


async def write(engine: TorchEngine, prompt: Sequence[int], plan: SteeringPlan) -> tuple[list[int], Finished]:
    found = await outcome(engine, replace(request(prompt, plan), sampling=GREEDY))
    return list(found.ids), found.end


@pytest.mark.slow
def test_a_gate_fires_on_its_topic_row_by_row_in_a_mixed_batch(engine: TorchEngine, gated: Profile) -> None:
    """Many rows over four slots; a prompt that does not open it gets the untouched model's tokens."""
    opening, others = FRESH.opening, FRESH.others
    prompts = [encode_prompt(LM.tokenizer, prompt or "") for prompt in (*opening, *others)]
    wanted = [True] * len(opening) + [False] * len(others)
    gate = gated.gate
    assert gate is not None

    async def run(plan: SteeringPlan) -> list[tuple[list[int], Finished]]:
        return await asyncio.gather(*(write(engine, ids, plan) for ids in prompts))

    rows = asyncio.run(run(plan(gated)))
    plain = asyncio.run(run(SteeringPlan()))
    always = asyncio.run(run(plan(replace(gated, gate=None, version="always"))))
    fired = [end.gates["warm"].opened for _, end in rows]
    assert f1_score(torch.tensor(fired), torch.tensor(wanted)) >= 0.9
    assert {True, False} == set(fired)
    for (ids, end), (untouched, _), (steered, _), prompt in zip(rows, plain, always, prompts, strict=True):
        decision = end.gates["warm"]
        assert decision.similarity == pytest.approx(similarity(LM, gate, prompt), abs=1e-4)
        assert decision.opened is gate.opens(decision.similarity or 0.0)
        assert ids == (steered if decision.opened else untouched)
        assert end.steered_tokens == (8 if decision.opened else 0)
    assert [ids for ids, _ in always] != [ids for ids, _ in plain]


def test_what_a_fit_finds(gate: Gate) -> None:
    assert min(len(TRAIN.opening), len(TRAIN.others)) > 30
    assert gate.metrics["f1_train"] >= 0.9
    assert gate.metrics["f1_heldout"] >= 0.9
    assert gate.metrics["prompts"] == [len(TRAIN.opening), len(TRAIN.others)]
    again = fit_gate(LM, TRAIN)
    assert torch.equal(again.direction, gate.direction)
    assert (again.layer, again.threshold, again.side) == (gate.layer, gate.threshold, gate.side)


def test_the_similarity_is_cast_s() -> None:
    draw = torch.Generator().manual_seed(0)
    means, direction = torch.randn(5, 8, generator=draw), torch.randn(8, generator=draw)
    projection = torch.outer(direction, direction) / (direction @ direction)
    expected = [torch.cosine_similarity(one, torch.tanh(projection @ one), dim=0) for one in means]
    torch.testing.assert_close(similarities(means, direction), torch.stack(expected))


def test_the_receipt_tells_the_decision(client: httpx.Client) -> None:
    body = {"max_tokens": 4, "temperature": 0, "steering": "warm+plain@0.1"}
    for prompts, opened in ((FRESH.opening, True), (FRESH.others, False)):
        messages = [{"role": one.role, "content": one.content} for one in prompts[0] or ()]
        warm, plain = client.post("/generate", json={**body, "messages": messages}).json()["steering"]
        assert warm["gate"]["opened"] is opened
        assert -1 <= warm["gate"]["similarity"] <= 1
        assert (warm["steered_tokens"], bool(warm["layers"])) == ((4, True) if opened else (0, False))
        assert plain["steered_tokens"] == 4
        assert "gate" not in plain


def test_a_prompt_of_one_token_opens_nothing(client: httpx.Client) -> None:
    (entry,) = client.post("/generate", json={"prompt": [300], "max_tokens": 2, "profile": "warm"}).json()["steering"]
    assert entry["gate"] == {"opened": False, "similarity": None}


def test_a_shut_gate_stays_shut_whatever_is_scheduled_or_changed(engine: HeldEngine, gated: Profile) -> None:
    """Alone in the batch, where no mask of positions stands between a row's shift and the row."""
    prompt = tuple(encode_prompt(LM.tokenizer, FRESH.others[0] or ""))
    scheduled = replace(request(prompt, plan(gated, steps((0, 0.5), (2, 1.0)))), sampling=GREEDY)

    async def changed() -> list[int]:
        engine.hold(after=-(-len(prompt) // 16) + 4, until_change=True)  # five tokens, before the seventh
        stream = await submit(engine, scheduled)
        await asyncio.to_thread(engine.until_held)
        change = await engine.set_steering(scheduled.ids[0], plan(gated, 0.5))
        ids = [token async for event in stream if isinstance(event, Delta) for token in event.token_ids]
        assert change.from_token < 8
        return ids

    untouched, _ = asyncio.run(write(engine, prompt, SteeringPlan()))
    assert asyncio.run(changed()) == untouched


def test_a_gate_that_joins_by_schedule_is_decided_by_the_prompt_too(client: httpx.Client) -> None:
    points = [{"from_token": 0, "strength": 0}, {"from_token": 3, "strength": 1}]
    steering = {"profiles": [{"name": "warm", "schedule": points}]}
    for prompts, opened in ((FRESH.opening, True), (FRESH.others, False)):
        messages = [{"role": one.role, "content": one.content} for one in prompts[0] or ()]
        body = {"messages": messages, "max_tokens": 6, "ignore_eos": True, "steering": steering}
        (entry,) = client.post("/generate", json=body).json()["steering"]
        assert entry["gate"]["opened"] is opened
        assert entry["steered_tokens"] == (3 if opened else 0)


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"prompt": "x y", "steering": {"profiles": [{"name": "warm"}], "apply_to": "all"}}),
    ("/v1/completions", {"model": "demo:warm", "prompt": "x y", "echo": True, "max_tokens": 0}),
    ("/score", {"prompt": "x y", "completions": ["z"], "steering": "warm"}),
]


@pytest.mark.parametrize(("path", "body"), REFUSED)
def test_where_a_prompt_cannot_decide_it_is_refused(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == 400, answer.text
    assert "gate" in answer.json()["error"]["message"]


def test_a_gate_cannot_join_a_running_generation(engine: TorchEngine, gated: Profile) -> None:
    async def run() -> None:
        await load(engine, plan(gated).versions)
        running = replace(request((5, 6, 7)), sampling=replace(GREEDY, max_tokens=200))
        stream = await submit(engine, running)
        with pytest.raises(SteeringError, match="cannot join a running generation"):
            await engine.set_steering(running.ids[0], plan(gated))
        await stream.aclose()

    asyncio.run(run())


def test_offline_a_gate_is_refused_rather_than_overlooked(gated: Profile) -> None:
    with pytest.raises(SteeringError, match="which only a server decides"), steer(LM, gated):
        pass


def test_labelled_prompts_are_read_strictly(tmp_path: Path) -> None:
    rows = [{"prompt": f"Bake {i}", "label": True} for i in range(8)]
    rows += [{"prompt": [{"role": "user", "content": f"Write {i}"}], "label": 0} for i in range(8)]

    def load(rows: Sequence[dict[str, Any]]) -> GatePrompts:
        file = tmp_path / "gate.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows))
        return load_gate_prompts(str(file))

    found = load(rows)
    assert (len(found.opening), len(found.others), found.source) == (8, 8, str(tmp_path / "gate.jsonl"))
    for bad, message in (
        (rows[:15], "there are 7 prompts with label false"),
        ([*rows, {"prompt": "x", "label": "maybe"}], "line 17, field 'label': 'maybe' is not a label"),
        ([*rows, {"prompt": "x", "label": True, "weight": 2}], "line 17, field 'weight'"),
        ([*rows, {"label": True}], "line 17, field 'prompt': it is missing"),
    ):
        with pytest.raises(DataError, match=message):
            load(bad)


def test_a_gate_that_cannot_be_is_refused() -> None:
    vector = torch.ones(LM.hidden_size)
    for make in (
        lambda: Gate(0, vector, float("nan"), "above"),
        lambda: Gate(0, vector * 0, 0.0, "above"),
        lambda: Gate(0, vector, 0.0, "left"),  # type: ignore[arg-type]
        lambda: replace(random_profile(LM.identity, "x"), gate=Gate(99, vector, 0.0, "above")),
        lambda: replace(random_profile(LM.identity, "x"), gate=Gate(0, torch.ones(3), 0.0, "above")),
    ):
        with pytest.raises(ProfileError, match="gate"):
            make()
