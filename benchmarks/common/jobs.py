"""Synthetic requests for speed benchmarks: prompts of random tokens, fixed completion lengths, random profiles.

No request ends early (`ignore_eos`), so compared sides do the same work.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.common.shapes import SHAPES, model_of, save_shape
from server.engines.protocol import GenerationRequest, PlanTerm, SamplingParameters, SteeringPlan
from steering_vectors.profiles.files import save_profile
from steering_vectors.profiles.profile import ModelIdentity, Profile

UNIT = 0.05
FIRST_ID = 3  # lower ids are special tokens of the demo model
ROUTES = {"completions": "/v1/completions", "generate": "/generate"}

Route = Literal["completions", "generate"]
Lengths = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Target:
    """The measured model: its directory, name, context and profiles."""

    source: str
    name: str
    vocabulary: int
    profiles: Path
    profile_names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """One request."""

    prompt: tuple[int, ...]
    tokens: int
    steering: tuple[tuple[str, float], ...]
    seed: int

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Job:
        """A job from its JSON form."""
        steering = tuple((name, strength) for name, strength in fields["steering"])
        return cls(tuple(fields["prompt"]), fields["tokens"], steering, fields["seed"])

    def path(self, route: Route) -> str:
        return ROUTES[route]

    def body(self, route: Route, model: str) -> dict[str, Any]:
        """The body of a streaming request."""
        terms = [{"name": name, "strength": strength} for name, strength in self.steering]
        body = {
            "prompt": list(self.prompt),
            "max_tokens": self.tokens,
            "seed": self.seed,
            "ignore_eos": True,
            "stream": True,
            "steering": {"profiles": terms},
        }
        return body if route == "generate" else {**body, "model": model, "stream_options": {"include_usage": True}}

    def request(self, request_id: str, profiles: Mapping[str, Profile]) -> GenerationRequest:
        """The same for an engine, which holds the profiles."""
        terms = tuple(PlanTerm(name, profiles[name].version, strength) for name, strength in self.steering)
        sampling = SamplingParameters(seed=self.seed, max_tokens=self.tokens, ignore_eos=True)
        return GenerationRequest((request_id,), self.prompt, sampling, SteeringPlan(terms))


@contextmanager
def target(model: str, *, dtype: str, profiles: int) -> Iterator[Target]:
    """A demo, directory or shape, with random profiles in a temporary directory."""
    with tempfile.TemporaryDirectory() as scratch:
        number = {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
        source = str(save_shape(model, Path(scratch), dtype=number)) if model in SHAPES else model
        loaded = model_of(source, dtype=number)
        names = tuple(f"random-{index}" for index in range(profiles))
        directory = Path(scratch) / "profiles"
        directory.mkdir()
        for seed, name in enumerate(names):
            save_profile(_random_profile(loaded.identity, name, seed), directory)
        name, vocabulary = loaded.name, loaded.vocab_size
        del loaded
        yield Target(source, name, vocabulary, directory, names)


def make_jobs(made_for: Target, count: int, *, prompts: Lengths, completions: Lengths, seed: int) -> list[Job]:
    """Jobs with uniform random lengths. A third is unsteered, a third has one profile, a third has two."""
    draw = random.Random(seed)
    return [
        Job(
            prompt=tuple(draw.choices(range(FIRST_ID, made_for.vocabulary), k=draw.randint(*prompts))),
            tokens=draw.randint(*completions),
            steering=_steering(draw, made_for.profile_names),
            seed=draw.randrange(2**31),
        )
        for _ in range(count)
    ]


def _steering(draw: random.Random, names: tuple[str, ...]) -> tuple[tuple[str, float], ...]:
    chosen = draw.sample(names, min(draw.randint(0, 2), len(names)))
    return tuple((name, round(draw.uniform(-1, 1), 2)) for name in chosen)


def _random_profile(identity: ModelIdentity, name: str, seed: int) -> Profile:
    """A random direction of norm 1 at half of the blocks, chosen at random."""
    generator = torch.Generator().manual_seed(seed)
    layers = torch.randperm(identity.num_layers, generator=generator)[: -(-identity.num_layers // 2)].tolist()
    drawn = {layer: torch.randn(identity.hidden_size, generator=generator) for layer in layers}
    directions = {layer: direction / direction.norm() for layer, direction in drawn.items()}
    return Profile(name=name, model=identity, directions=directions, method="random", unit=UNIT)


def lengths_of(text: str) -> Lengths:
    """Parse `16:128` or `64`. Raises ValueError."""
    low, _, high = text.partition(":")
    found = int(low), int(high or low)
    if not 0 < found[0] <= found[1]:
        raise ValueError(f"{text!r} is not a range of lengths; write 16:128 or 64")
    return found
