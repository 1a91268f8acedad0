"""Engines for the contract suite: each kind is made by a coroutine from the same settings."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from server.engines.config import EngineConfig
from server.engines.process import ProcessEngine
from server.engines.protocol import Engine
from server.engines.torch.engine import TorchEngine
from steering_vectors.models.loading import LanguageModel, wrap_model
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

POISON = 9  # a token whose embedding is NaN: a prompt with it cannot be computed


def tiny_language_model() -> LanguageModel:
    """The model of the contract's engines: the same numbers in every process."""
    found = wrap_model(tiny_model("llama"), tiny_tokenizer(), name="tiny")
    with torch.no_grad():
        found.model.get_input_embeddings().weight[POISON] = float("nan")
    return found


def make_engine(config: EngineConfig) -> TorchEngine:
    torch.set_num_threads(1)
    return TorchEngine(tiny_language_model(), config)


async def in_this_process(config: EngineConfig) -> Engine:
    return make_engine(config)


async def behind_a_process_border(config: EngineConfig) -> Engine:
    return await ProcessEngine.start(partial(make_engine, config))


ENGINES: dict[str, Callable[[EngineConfig], Awaitable[Engine]]] = {
    "torch": in_this_process,
    "process": behind_a_process_border,
}


@dataclass(frozen=True, slots=True)
class Served:
    """An engine and the event loop that it belongs to."""

    engine: Any
    run: Callable[[Any], Any]


@contextmanager
def served(kind: str, **options: Any) -> Iterator[Served]:
    with asyncio.Runner() as runner:
        engine = runner.run(ENGINES[kind](EngineConfig(**options)))  # type: ignore[arg-type]
        try:
            yield Served(engine, runner.run)
        finally:
            runner.run(engine.close())
