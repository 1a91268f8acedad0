"""The intake: what is refused before any work is done, and what the engine is asked."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.api.native.generate import CompareBody, GenerateBody, ScoreBody
from server.api.openai.requests import ChatBody, CompletionBody, OpenAIBody
from server.engines.errors import UnknownProfile
from server.engines.pool import DaemonPool
from server.engines.protocol import Capability, EngineInfo, EventStream, GenerationRequest
from server.engines.torch.engine import TorchEngine
from server.generation.answer_sizes import AnswerBudget
from server.generation.intake import Asking, Intake, longest_text
from server.generation.load import Load
from server.generation.request_limits import RequestLimits
from server.profiles.registry import ProfileRegistry
from steering_vectors.errors import RequestError
from tests.support.serving import engine_fixture, profiles_fixture

LONG = "x" * 10_000_000  # to encode it takes seconds
MESSAGES = [{"role": "user", "content": "Hello"}]
engine = engine_fixture(slots=2, context=64, max_queue=4)
profiles = profiles_fixture("warm", "concise")


DEFAULT_LIMITS = RequestLimits()


class Recorder:
    """An engine with fewer capabilities that keeps what it is asked for."""

    def __init__(self, engine: TorchEngine, without: set[Capability]) -> None:
        self._engine = engine
        self.info: EngineInfo = replace(
            engine.info, name="small", capabilities=engine.info.capabilities - frozenset(without)
        )
        self.asked: list[GenerationRequest] = []
        self.streams = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def submit(self, requests: Sequence[GenerationRequest]) -> EventStream:
        self.asked += requests
        self.streams += 1
        return await self._engine.submit(requests)


@asynccontextmanager
async def intake_of(
    recorder: Recorder, profiles: Path, limits: RequestLimits = DEFAULT_LIMITS
) -> AsyncIterator[Intake]:
    registry = ProfileRegistry(profiles, recorder)  # type: ignore[arg-type]
    await registry.start()
    pool, budget = DaemonPool(1, "tokenizing"), AnswerBudget(1_000_000)
    load = Load(recorder.info.slots, recorder.info.capacity, 0.5)
    longest = longest_text(recorder.info)
    yield Intake(recorder, "demo", registry, pool, budget, load, longest, limits)  # type: ignore[arg-type]
    assert (load.total, budget.used) == (0, 0)
    pool.close()
    await registry.stop()


Ask = Callable[[Asking], Recorder]


@pytest.fixture
def ask(engine: TorchEngine, profiles: Path, request: pytest.FixtureRequest) -> Ask:
    """Run a body to its end, on an engine without the test's capabilities."""
    without: set[Capability] = set(getattr(request, "param", ()))

    def run(body: Asking) -> Recorder:
        recorder = Recorder(engine, without)

        async def main() -> None:
            async with intake_of(recorder, profiles) as intake:
                generations = await intake.submit(body)
                await generations.results()

        _run(main())
        return recorder

    return run


def _run(main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner() as runner:
        runner.run(main)


def test_all_choices_of_a_request_are_one_request_with_one_stream(ask: Ask) -> None:
    body = CompletionBody(model="demo", prompt=["a", "b"], n=2, max_tokens=2, seed=1)
    made = ask(body)
    assert (made.streams, [one.n for one in made.asked]) == (1, [2, 2])
    ids = [name for one in made.asked for name in one.ids]
    assert len(set(ids)) == 4


def test_one_plan_from_every_form_of_steering(ask: Ask) -> None:
    chat = {"model": "demo", "messages": MESSAGES, "max_tokens": 1}
    term = {"name": "warm", "strength": 0.5}
    bodies: list[OpenAIBody | GenerateBody | ScoreBody] = [
        ChatBody(**chat, steering="warm@0.5"),
        ChatBody(**{**chat, "model": "demo:warm@0.5"}),
        ChatBody(**chat, steering={"profiles": [term]}),
        GenerateBody(prompt="a", max_tokens=1, profile="warm", strength=0.5),
        GenerateBody(prompt="a", max_tokens=1, steering="warm@0.5"),
        ScoreBody(prompt="a", completions=["b"], steering="warm@0.5"),
    ]
    plans = {ask(body).asked[0].plan for body in bodies}
    assert len(plans) == 1
    assert plans.pop().terms[0].version


REFUSED: list[tuple[set[Capability], Asking, str]] = [
    ({"logprobs"}, ChatBody(model="demo", messages=MESSAGES, logprobs=True), "logprobs"),
    ({"schedules"}, GenerateBody(prompt=LONG, steering={"profiles": [
        {"name": "warm", "schedule": [{"from_token": 0, "strength": 1.0}]}]}), "steering.schedule"),
    ({"layers"}, GenerateBody(prompt=LONG, steering={"profiles": [{"name": "warm", "layers": [1]}]}),
     "steering.layers"),
    ({"apply_to_all"}, GenerateBody(prompt=LONG, steering={"profiles": [{"name": "warm"}], "apply_to": "all"}),
     "steering.apply_to"),
    ({"preserve_norm"}, GenerateBody(prompt=LONG, steering={"profiles": [{"name": "warm"}], "preserve_norm": True}),
     "steering.preserve_norm"),
    ({"constraints"}, GenerateBody(prompt=LONG, guided_regex="a"), "guided_regex"),
    ({"scoring"}, ScoreBody(prompt=LONG, completions=["a"]), "completions"),
    ({"prompt_logprobs"}, CompletionBody(model="demo", prompt=LONG, echo=True, logprobs=1), "echo"),
    ({"divergence"}, CompareBody(prompt=LONG, variants=["warm"], kl=True), "kl"),
    ({"projections"}, GenerateBody(prompt=LONG, steering="warm", projections=True), "projections"),
]  # fmt: skip


@pytest.mark.parametrize(("ask", "body", "param"), REFUSED, indirect=["ask"], ids=[one[2] for one in REFUSED])
def test_what_the_engine_cannot_do_is_refused_by_field_and_engine(ask: Ask, body: Asking, param: str) -> None:
    with pytest.raises(RequestError) as failure:
        ask(body)
    assert failure.value.message == f"{param} is not supported by the small engine: leave it out"
    assert (failure.value.param, failure.value.code) == (param, "not_supported")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (ChatBody(model="demo", messages=[{"role": "user", "content": LONG}], n=7), "n"),
        (CompletionBody(model="demo", prompt=[LONG] * 7), "prompt"),
        (CompareBody(prompt=LONG, variants=["warm"] * 7), "variants"),
        (ScoreBody(prompt=LONG, completions=["a"] * 7), "completions"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_counts_are_checked_before_any_work(
    ask: Ask, body: Asking, param: str, monkeypatch: pytest.MonkeyPatch, engine: TorchEngine
) -> None:
    def no_work(*_: object, **__: object) -> None:
        raise AssertionError("a prompt was encoded")

    monkeypatch.setattr(type(engine.info.tokenizer), "__call__", no_work)
    monkeypatch.setattr(type(engine.info.tokenizer), "encode", no_work)
    with pytest.raises(RequestError) as failure:
        ask(body)
    expected = f"{param}: 7 generations exceed the 4 that one request may have here: request fewer"
    assert (failure.value.message, failure.value.param) == (expected, param)


LONGER = "x" * 4000  # characters; one token has a few at most


@pytest.mark.parametrize(
    ("body", "param", "what"),
    [
        (GenerateBody(prompt=LONGER), "prompt", "the prompt has 4000 characters"),
        (CompletionBody(model="demo", prompt=["a", LONGER]), "prompt", "the prompt has 4000 characters"),
        (CompletionBody(model="demo", prompt=[5] * 65), "prompt", "the prompt has 65 tokens; the context holds 64"),
        (
            ChatBody(model="demo", messages=[{"role": "user", "content": LONGER[:2000]}] * 2),
            "messages",
            "the prompt has 4000 characters",
        ),
        (ScoreBody(prompt="a", completions=["b", LONGER]), "completions[1]", "completions[1] has 4000 characters"),
    ],
    ids=["text", "texts", "ids", "messages", "completion"],
)
def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenized(
    ask: Ask, body: Asking, param: str, what: str, monkeypatch: pytest.MonkeyPatch, engine: TorchEngine
) -> None:
    encoded: list[int] = []
    call = type(engine.info.tokenizer).__call__

    def noted(self: Any, text: Any, *given: Any, **options: Any) -> Any:
        encoded.append(len(text))
        return call(self, text, *given, **options)

    monkeypatch.setattr(type(engine.info.tokenizer), "__call__", noted)
    with pytest.raises(RequestError) as failure:
        ask(body)
    assert failure.value.message.startswith(what)
    assert (failure.value.param, failure.value.code) == (param, "context_length_exceeded")
    assert max(encoded, default=0) < 10


def test_a_profile_is_named_by_its_field(ask: Ask) -> None:
    for body, param in (
        (GenerateBody(prompt="a", profile="kind"), "profile"),
        (GenerateBody(prompt="a", steering="kind"), "steering"),
        (CompareBody(prompt="a", variants=["warm", "kind"]), "variants[1]"),
    ):
        with pytest.raises(UnknownProfile) as failure:
            ask(body)
        assert failure.value.param == param


def test_neither_the_protocol_nor_the_intake_imports_torch() -> None:
    code = "import sys, server.engines.protocol, server.generation.intake; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
