"""Helpers that run requests on an engine and collect their outcomes, and plain references."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import pytest
import torch

from server.engines.config import EngineConfig
from server.engines.detokenizer import Detokenizer
from server.engines.protocol import (
    Delta,
    Engine,
    EventStream,
    Finished,
    GenerationRequest,
    PlanTerm,
    SamplingParameters,
    SteeringChange,
    SteeringPlan,
    StrengthSchedule,
)
from server.engines.torch.engine import TorchEngine
from server.engines.torch.plans import ResolvedPlan, SteeringState
from server.engines.torch.sampling.request_sampler import RequestSampler
from server.engines.torch.scheduling.request_state import RequestState
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.mixture import Mixture, Term
from steering_vectors.profiles.profile import Profile
from steering_vectors.steering.accelerated_bank import AcceleratedBank
from tests.support.tiny_tokenizers import tiny_tokenizer

PATIENCE = 20.0
_ids = count()
KNOWN: dict[str, Profile] = {}  # by version: what plans of this process name


class HeldEngine(TorchEngine):
    """An engine whose steps a test can hold, so that events between two tokens are deterministic."""

    def __init__(self, *given: Any, **options: Any) -> None:
        self._left: int | None = None
        self._of: str | None = None
        self._until_change = self._is_changing = False
        self._go, self._held = threading.Event(), threading.Event()
        self.cancelled: list[str] = []
        super().__init__(*given, **options)

    def hold(self, after: int = 0, *, of: str | None = None, until_change: bool = False) -> None:
        """Stop after `after` more steps, or once choice `of` has `after` tokens however many steps others take, until
        `go`, or until a change of steering is requested."""
        self._go.clear()
        self._held.clear()
        self._of, self._left, self._until_change = of, after, until_change

    def until_held(self) -> None:
        assert self._held.wait(PATIENCE), "it has no step to take"

    def go(self) -> None:
        self._left = None
        self._go.set()

    def step(self) -> None:
        left = self._left
        if left is not None and self._is_due(left):
            self._held.set()
            try:
                assert self._go.wait(PATIENCE), "the test never let it go"
            finally:
                self._left = None  # one test that fails holds no other
        elif left is not None and self._of is None:
            self._left = left - 1
        super().step()

    def _is_due(self, left: int) -> bool:
        if self._of is None:
            return left == 0
        state = self._requests.get(self._of)
        return state is not None and state.completion_length >= left

    async def set_steering(self, id: str, plan: SteeringPlan) -> SteeringChange:
        self._is_changing = self._until_change
        try:
            return await super().set_steering(id, plan)
        finally:
            self._is_changing = False

    def _send(self, command: Callable[[], Any]) -> None:
        super()._send(command)
        if self._is_changing:
            self._is_changing = False
            self.go()

    def _cancel(self, ids: Sequence[str]) -> bool:
        self.cancelled += ids
        return super()._cancel(ids)


class JumpingClock:
    """The clock by which engines of this process look at deadlines, which a test can put forward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._ahead = 0.0
        monkeypatch.setattr("server.engines.torch.loop.time", self)

    def perf_counter(self) -> float:
        return time.perf_counter() + self._ahead

    def jump(self, seconds: float) -> None:
        self._ahead += seconds


@dataclass(frozen=True, slots=True)
class Outcome:
    text: str
    deltas: tuple[str, ...]
    ids: tuple[int, ...]
    end: Finished


def request(prompt_ids: Sequence[int], plan: SteeringPlan | None = None, **sampling: Any) -> GenerationRequest:
    """One choice, greedy unless told otherwise."""
    parameters = SamplingParameters(**{"temperature": 0.0, "max_tokens": 16, **sampling})
    return GenerationRequest((f"r{next(_ids)}",), tuple(prompt_ids), parameters, plan or SteeringPlan())


async def load(engine: Engine, versions: Iterable[str]) -> None:
    """Load what plans name, once for each engine."""
    loading = engine.__dict__.setdefault("loaded_by_tests", {})
    for version in dict.fromkeys(versions):
        if version in KNOWN and version not in loading:
            loading[version] = asyncio.ensure_future(engine.load_profile(KNOWN[version]))
        if version in loading:
            await loading[version]


async def submit(engine: Engine, *requests: GenerationRequest) -> EventStream:
    """As the engine's, after the profiles were loaded."""
    await load(engine, [version for one in requests for version in one.versions])
    return await engine.submit(requests)


async def outcomes(engine: Engine, *requests: GenerationRequest) -> list[Outcome]:
    """What comes of each choice of some requests that are submitted together."""
    names = [name for one in requests for name in one.ids]
    deltas: dict[str, list[Delta]] = {name: [] for name in names}
    ends: dict[str, Finished] = {}
    async for event in await submit(engine, *requests):
        assert event.id not in ends, "an event after the terminal one"
        if isinstance(event, Finished):
            ends[event.id] = event
        elif isinstance(event, Delta):
            deltas[event.id].append(event)
    assert set(ends) == set(names)
    return [
        Outcome(
            "".join(delta.text for delta in deltas[name]),
            tuple(delta.text for delta in deltas[name]),
            tuple(token for delta in deltas[name] for token in delta.token_ids),
            ends[name],
        )
        for name in names
    ]


async def outcome(engine: Engine, generation: GenerationRequest) -> Outcome:
    (one,) = await outcomes(engine, generation)
    return one


@asynccontextmanager
async def running(language_model: LanguageModel, *, channel: Any = None, **options: Any) -> AsyncIterator[HeldEngine]:
    engine = HeldEngine(language_model, EngineConfig(**options), channel=channel)
    try:
        yield engine
        engine._scheduler.check_integrity()
    finally:
        await engine.close()


def run_all(language_model: LanguageModel, requests: Sequence[GenerationRequest], **options: Any) -> list[Outcome]:
    """Run all requests at once on a new engine."""

    async def main() -> list[Outcome]:
        async with running(language_model, **options) as engine:
            return await asyncio.gather(*(outcome(engine, generation) for generation in requests))

    return asyncio.run(main())


@contextmanager
def attached_bank(language_model: LanguageModel, rows: int) -> Iterator[AcceleratedBank]:
    """A bank that is attached inside the context, without gradients."""
    bank = AcceleratedBank.over(language_model, rows=rows)
    bank.attach()
    try:
        with torch.inference_mode():
            yield bank
    finally:
        bank.detach()


def random_profile(
    language_model: LanguageModel, name: str = "random", *, seed: int = 0, scale: float = 1.0, **fields: Any
) -> Profile:
    """Random directions at every block; `scale` is their norm."""
    generator = torch.Generator().manual_seed(seed)
    layers = fields.pop("layers", range(language_model.num_layers))
    directions = {}
    for layer in layers:
        direction = torch.randn(language_model.hidden_size, generator=generator)
        directions[layer] = scale * direction / direction.norm()
    made = Profile(name=name, model=language_model.identity, directions=directions, method="random", **fields)
    return versioned(made)


def versioned(profile: Profile) -> Profile:
    """A profile with the version it would have if it were stored."""
    return replace(profile, version=profile.content_digest())


def mixture(profile: Profile, strength: float = 1.0, **fields: Any) -> Mixture:
    return Mixture((Term(profile, strength),), **fields)


def term(profile: Profile, strength: float | StrengthSchedule = 1.0, layers: tuple[int, ...] | None = None) -> PlanTerm:
    """One profile of a plan, known to `submit`."""
    KNOWN[profile.version] = profile
    if isinstance(strength, StrengthSchedule):
        return PlanTerm(profile.name, profile.version, layers=layers, schedule=strength)
    return PlanTerm(profile.name, profile.version, strength, layers)


def plan(profile: Profile, strength: float | StrengthSchedule = 1.0, **fields: Any) -> SteeringPlan:
    """A plan of one profile."""
    return SteeringPlan((term(profile, strength),), **fields)


def steps(*points: tuple[int, float]) -> StrengthSchedule:
    return StrengthSchedule(points)


def prompts(language_model: LanguageModel, lengths: Sequence[int], *, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    high = language_model.vocab_size
    return [torch.randint(3, high, (length,), generator=generator).tolist() for length in lengths]


def reference_ids(language_model: LanguageModel, prompt_ids: Sequence[int], max_tokens: int) -> tuple[int, ...]:
    """Greedy ids of transformers' `generate`, which continues past end-of-text tokens."""
    settings = language_model.model.generation_config
    eos, settings.eos_token_id = settings.eos_token_id, None
    try:
        output = language_model.model.generate(
            torch.tensor([list(prompt_ids)]),
            attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=max_tokens,
            pad_token_id=0,
        )
    finally:
        settings.eos_token_id = eos
    return tuple(output[0, len(prompt_ids) :].tolist())


def state(prompt_ids: Sequence[int], plan: SteeringPlan | None = None, name: str = "a", **fields: Any) -> RequestState:
    """The state of a request in the engine, without a model."""
    made = GenerationRequest((name,), tuple(prompt_ids), SamplingParameters(), plan or SteeringPlan(), **fields)
    profiles = {version: KNOWN[version] for version in made.versions}
    return RequestState(
        name,
        made,
        SteeringState(ResolvedPlan(made.plan, profiles), generated_from=len(prompt_ids) - made.scored_suffix - 1),
        RequestSampler(made.sampling, vocab_size=2**20, eos_ids=frozenset(), prompt_ids=prompt_ids),
        Detokenizer(tiny_tokenizer(), prompt_ids),
    )
