"""trimtab in a peer's process: the engine in its thread, with a different steering in every row.

A step is measured from the end of the previous step to its own end, which includes the engine's work between steps.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.peers.commands import Batch, Setup, serve, timed
from server.engines.config import DEFAULT_CHUNK, EngineConfig
from server.engines.protocol import Delta, Finished, GenerationRequest, PlanTerm, SamplingParameters, SteeringPlan
from server.engines.torch.engine import TorchEngine
from steering_vectors.models.loading import LanguageModel, computing_dtype, load_model
from steering_vectors.profiles.profile import Profile
from steering_vectors.runtime.cpu.choose_packing import pack_if_faster
from steering_vectors.runtime.cpu.packing import pack
from steering_vectors.runtime.cpu.threads import run_apart

STRENGTH = 0.02
PATIENCE_MS = 60_000.0  # earlier rows wait for the prompts of the others, in whole chunks


class TimedEngine(TorchEngine):
    """Records the end of each step, with the number of generated tokens and of computed prompt tokens so far."""

    def __init__(self, *given: Any, **options: Any) -> None:
        self.ends: list[tuple[float, int, int]] = []
        super().__init__(*given, **options)

    def step(self) -> None:
        super().step()
        found = self.stats()
        self.ends.append((time.perf_counter(), found.generated_tokens, found.prompt_tokens))


def _loaded(setup: Setup) -> LanguageModel:
    language_model = load_model(setup.model, dtype="auto" if setup.served and not setup.codes else "bfloat16")
    if setup.codes:
        pack(language_model.model, "gguf", dtype=computing_dtype(torch.bfloat16, language_model.device))
    elif setup.served:
        pack_if_faster(language_model)
    else:
        pack(language_model.model)
    return language_model


class Trimtab:
    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        language_model = run_apart(lambda: _loaded(setup))
        profiles = run_apart(lambda: _profiles(language_model, setup.rows))
        self._steering = [SteeringPlan((PlanTerm(profile.name, profile.version),)) for profile in profiles]
        self._decoding = self._steering if setup.steered else [SteeringPlan()] * setup.rows
        length = setup.length + setup.rows * setup.length // DEFAULT_CHUNK
        self._engine = TimedEngine(
            language_model, EngineConfig(slots=setup.rows, context=length, max_stall_ms=PATIENCE_MS)
        )
        asyncio.run(self._load(profiles))
        self.version = f"trimtab ({self._engine.info.path}, {str(language_model.dtype).removeprefix('torch.')})"
        self._ids = itertools.count()

    async def _load(self, profiles: list[Profile]) -> None:
        for profile in profiles:
            await self._engine.load_profile(profile)

    def decode(self, batch: Batch) -> list[float]:
        """Rows begin one after another as their prompts are computed, so the first rows generate unmeasured tokens."""
        self._engine.ends.clear()
        begun_early = batch.rows * batch.context // DEFAULT_CHUNK + 1
        self._run(batch, batch.new + begun_early, self._decoding)
        ends = self._engine.ends
        return [
            after[0] - before[0]
            for before, after in itertools.pairwise(ends)
            if after[1] - before[1] == batch.rows and after[2] == before[2]
        ][: batch.new]

    def prefill(self, batch: Batch) -> float:
        return timed(lambda: self._run(batch, batch.new, self._decoding))

    def tokens(self, batch: Batch) -> list[list[int]]:
        return self._run(batch, batch.new, [SteeringPlan()] * batch.rows)

    def steered(self, batch: Batch) -> float:
        return timed(lambda: self._run(batch, batch.new, self._steering))

    def _run(self, batch: Batch, new: int, steering: list[SteeringPlan]) -> list[list[int]]:
        async def all_rows() -> list[list[int]]:
            return list(await asyncio.gather(*self._rows(batch, new, steering)))

        return asyncio.run(all_rows())

    def _rows(self, batch: Batch, new: int, steering: list[SteeringPlan]) -> list[Coroutine[Any, Any, list[int]]]:
        sampling = SamplingParameters(temperature=0.0, max_tokens=new, ignore_eos=True)
        return [
            self._row(GenerationRequest((f"row-{next(self._ids)}",), tuple(prompt), sampling, plan))
            for prompt, plan in zip(batch.prompts, steering, strict=False)
        ]

    async def _row(self, request: GenerationRequest) -> list[int]:
        written: list[int] = []
        async for event in await self._engine.submit([request]):
            if isinstance(event, Delta):
                written += event.token_ids
            elif isinstance(event, Finished) and event.reason != "length":
                raise RuntimeError(f"a row ended with {event.reason}: {event.error}")
        return written


def _profiles(language_model: LanguageModel, rows: int) -> list[Profile]:
    """A random direction at every block, other ones for each row."""
    draw = torch.Generator().manual_seed(0)
    shape = (rows, language_model.num_layers, language_model.hidden_size)
    return [
        Profile(
            f"row-{row}", language_model.identity, dict(enumerate(directions)), method="random", version=f"{row:064d}"
        )
        for row, directions in enumerate(STRENGTH * torch.randn(shape, generator=draw))
    ]


if __name__ == "__main__":
    serve(Trimtab)
