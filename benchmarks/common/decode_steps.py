"""The cost of a constraint per decode step: the same steps of one engine with and without it, in alternating pairs.

The engine runs in this process. A step counts if all its rows decode. Wall time is what clients wait for; CPU time is
that of the engine's thread, which other programs disturb less. All rows have the same sampling parameters, and none
ends early.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.common.order_schemas import long_order
from benchmarks.common.shapes import SHAPES, model_of
from server.engines.config import EngineConfig
from server.engines.protocol import Constraint, GenerationRequest, SamplingParameters
from server.engines.torch.engine import TorchEngine
from steering_vectors.data.chat import encode_prompt
from steering_vectors.models.loading import LanguageModel

END = "<|endoftext|>"
PROMPT = "Write down an order."
_ids = itertools.count()


@dataclass(frozen=True, slots=True)
class Step:
    """Milliseconds of one step."""

    wall: float
    cpu: float


class TimedEngine(TorchEngine):
    """Records each step in which all slots decode."""

    def __init__(self, language_model: LanguageModel, **options: Any) -> None:
        self.steps: list[Step] = []
        super().__init__(language_model, EngineConfig(**options))

    def step(self) -> None:
        before, wall, cpu = self.stats(), time.perf_counter(), time.thread_time()
        super().step()
        spent = Step(1e3 * (time.perf_counter() - wall), 1e3 * (time.thread_time() - cpu))
        after = self.stats()
        full = after.generated_tokens - before.generated_tokens == self.info.slots
        if full and after.prompt_tokens == before.prompt_tokens:
            self.steps.append(spent)


def measure(language_model: LanguageModel, *, rows: int, steps: int, pairs: int) -> dict[str, Any]:
    """Medians over pairs of runs of the median step, by the number of different schemas of the rows."""
    torch.set_num_threads(1)
    return asyncio.run(_measure(language_model, rows, steps, pairs))


async def _measure(language_model: LanguageModel, rows: int, steps: int, pairs: int) -> dict[str, Any]:
    prompt = tuple(encode_prompt(language_model.tokenizer, PROMPT))
    engine = TimedEngine(language_model, slots=rows, context=len(prompt) + steps)
    try:
        constraints = [_constraint(number) for number in range(rows)]
        found = {}
        for name, given in ((f"{rows} schemas", constraints), ("one schema", constraints[:1] * rows)):
            found[name] = await _in_pairs(engine, prompt, [given, [None] * rows], steps, pairs)
    finally:
        await engine.close()
    return {
        "vocabulary": {"model": language_model.vocab_size, "tokenizer": len(language_model.tokenizer)},
        "rows": rows,
        "steps": steps,
        "pairs": pairs,
        "found": found,
    }


def _constraint(number: int) -> Constraint:
    return Constraint("json", json.dumps(long_order(number)))


async def _in_pairs(
    engine: TimedEngine, prompt: tuple[int, ...], sides: list[Sequence[Constraint | None]], steps: int, pairs: int
) -> dict[str, Any]:
    """Run each side once to warm up, then in pairs of alternating order."""
    taken: list[tuple[Step, Step]] = []
    for pair in range(pairs + 1):
        order = (0, 1) if pair % 2 else (1, 0)
        medians = {side: await _run(engine, prompt, sides[side], steps) for side in order}
        if pair:
            taken.append((medians[0], medians[1]))
    return {clock: _compared([(getattr(a, clock), getattr(b, clock)) for a, b in taken]) for clock in ("wall", "cpu")}


def _compared(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    added = sorted(given - free for given, free in pairs)
    return {
        "free": median(free for _, free in pairs),
        "constrained": median(given for given, _ in pairs),
        "added": median(added),
        "added_range": [added[0], added[-1]],
        "ratio": median(given / free for given, free in pairs),
        "pairs": [list(pair) for pair in pairs],
    }


async def _run(
    engine: TimedEngine, prompt: tuple[int, ...], constraints: Sequence[Constraint | None], steps: int
) -> Step:
    """The median step of one batch of rows, one for each constraint."""
    engine.steps.clear()
    await asyncio.gather(
        *(_drain(engine, _request(prompt, seed, steps, constraint)) for seed, constraint in enumerate(constraints))
    )
    if len(engine.steps) < steps // 2:
        raise RuntimeError(f"only {len(engine.steps)} steps had all rows, because some texts ended early")
    return Step(median(step.wall for step in engine.steps), median(step.cpu for step in engine.steps))


def _request(prompt: tuple[int, ...], seed: int, steps: int, constraint: Constraint | None) -> GenerationRequest:
    sampling = SamplingParameters(temperature=1.5, seed=seed, max_tokens=steps, ignore_eos=constraint is None)
    return GenerationRequest((f"step-{next(_ids)}",), prompt, sampling, constraint=constraint)


async def _drain(engine: TimedEngine, request: GenerationRequest) -> None:
    async for _ in await engine.submit([request]):
        pass


def model_of_shape(shape: str, tokenizer: Path | None = None) -> LanguageModel:
    """The model of `shapes.model_of`, whose name may be abbreviated. `tokenizer` replaces its own, because the cost of
    a mask depends on the tokens: a directory, or a text file to train a tokenizer of the same size on."""
    found = model_of(next((name for name in SHAPES if name.startswith(shape)), shape))
    if tokenizer is None:
        return found
    known = trained(tokenizer, found.vocab_size) if tokenizer.is_file() else AutoTokenizer.from_pretrained(tokenizer)
    found.model.generation_config.eos_token_id = known.eos_token_id
    return replace(found, tokenizer=known)


def trained(file: Path, size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train([str(file)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)
