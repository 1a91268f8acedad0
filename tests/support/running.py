"""Driving an engine from a test: submit requests, collect their ends. Also plain references."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch

from server.engines.protocol import Delta, Finished, GenerationRequest, SamplingParameters, SteeringChange
from server.engines.torch.engine import TorchEngine
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.mixture import Mixture, Term
from steering_vectors.profiles.profile import Profile
from steering_vectors.steering.accelerated_bank import AcceleratedBank

PATIENCE = 20.0
_ids = count()


class HeldEngine(TorchEngine):
    """An engine that takes no more steps than a test lets it, so that what happens between two tokens is certain."""

    def __init__(self, *given: Any, **options: Any) -> None:
        self._left: int | None = None
        self._until_change = False
        self._go, self._held = threading.Event(), threading.Event()
        self.cancelled: list[str] = []
        super().__init__(*given, **options)

    def hold(self, after: int = 0, *, until_change: bool = False) -> None:
        """Wait after so many more steps until `go`, or until a change of steering is asked for."""
        self._go.clear()
        self._held.clear()
        self._left, self._until_change = after, until_change

    def until_held(self) -> None:
        assert self._held.wait(PATIENCE), "it has no step to take"

    def go(self) -> None:
        self._left = None
        self._go.set()

    def step(self) -> None:
        left = self._left
        if left == 0:
            self._held.set()
            assert self._go.wait(PATIENCE), "the test never let it go"
        elif left is not None:
            self._left = left - 1
        super().step()

    def set_steering(self, request_id: str, mixture: Mixture) -> Awaitable[SteeringChange]:
        changed = super().set_steering(request_id, mixture)
        if self._until_change:
            self.go()
        return changed

    def cancel(self, request_id: str) -> bool:
        self.cancelled.append(request_id)
        return super().cancel(request_id)


@dataclass(frozen=True, slots=True)
class Outcome:
    text: str
    deltas: tuple[str, ...]
    ids: tuple[int, ...]
    end: Finished


def request(prompt_ids: Sequence[int], mixture: Mixture | None = None, **sampling: Any) -> GenerationRequest:
    """Greedy unless told otherwise."""
    parameters = SamplingParameters(**{"temperature": 0.0, "max_tokens": 16, **sampling})
    return GenerationRequest(f"r{next(_ids)}", tuple(prompt_ids), parameters, mixture or Mixture())


async def outcome(engine: TorchEngine, generation: GenerationRequest) -> Outcome:
    deltas, ids, ends = [], [], []
    async for event in engine.generate(generation):
        assert not ends, "an event after the terminal one"
        if isinstance(event, Delta):
            deltas.append(event.text)
            ids.extend(event.token_ids)
        else:
            ends.append(event)
    assert len(ends) == 1
    return Outcome("".join(deltas), tuple(deltas), tuple(ids), ends[0])


@asynccontextmanager
async def running(language_model: LanguageModel, **options: Any) -> AsyncIterator[HeldEngine]:
    engine = HeldEngine(language_model, **options)
    try:
        yield engine
        engine._scheduler.check_integrity()
    finally:
        await engine.close()


def run_all(language_model: LanguageModel, requests: Sequence[GenerationRequest], **options: Any) -> list[Outcome]:
    """All requests at once through an engine of their own."""

    async def main() -> list[Outcome]:
        async with running(language_model, **options) as engine:
            return await asyncio.gather(*(outcome(engine, generation) for generation in requests))

    return asyncio.run(main())


@contextmanager
def attached_bank(language_model: LanguageModel, rows: int) -> Iterator[AcceleratedBank]:
    """A bank whose hooks are registered inside, where no gradients are kept."""
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
    return Profile(
        name=name,
        model=language_model.identity,
        directions=directions,
        method="random",
        version=f"{seed:064d}",
        **fields,
    )


def mixture(profile: Profile, strength: float = 1.0, **fields: Any) -> Mixture:
    return Mixture((Term(profile, strength),), **fields)


def prompts(language_model: LanguageModel, lengths: Sequence[int], *, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    high = language_model.vocab_size
    return [torch.randint(3, high, (length,), generator=generator).tolist() for length in lengths]


def reference_ids(language_model: LanguageModel, prompt_ids: Sequence[int], max_tokens: int) -> tuple[int, ...]:
    """Greedy ids of transformers' own `generate`, which is made to run past end-of-sequence tokens."""
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
