"""Whether trimtab computes a GGUF file as llama.cpp does: greedy tokens of both on the same prompts.

    python -m benchmarks.peers.compare --install --peers llama [--venvs DIR]     # llama.cpp, once
    python -m benchmarks.quality.gguf_agreement [--model FILE.gguf] [--venvs DIR]

The engine continues twenty chat prompts greedily in float32: with the plain weights of the converted checkpoint, which
are rounded to bfloat16, and over the file's codes (`--quantize gguf`). Teacher-forced, llama.cpp is given the prompt
and trimtab's tokens so far at every place, and the share of equal most likely tokens is counted. Free-running, both
continue by themselves, and everything after a first difference may differ. llama.cpp rounds activations to 8 bits in
its products, so that near ties may fall differently. Fails if fewer than 95 % of the teacher-forced tokens are equal.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.peers.commands import Setup
from benchmarks.peers.process import HERE, OFFLINE
from benchmarks.peers.venvs import VENVS
from server.engines.config import EngineConfig
from server.engines.protocol import Delta, GenerationRequest, SamplingParameters, SteeringPlan
from server.engines.torch.build import build_engine
from server.engines.torch.engine import TorchEngine
from steering_vectors.data.chat import Message, encode_prompt
from steering_vectors.models.gguf import SMOLLM2, find_gguf, smollm2_file
from steering_vectors.runtime.cpu.threads import run_apart

WANTED = 0.95
CONTEXT = 512
SERVED: dict[str, Literal["gguf"] | None] = {"plain": None, "codes": "gguf"}
SCRIPT = HERE / "llama_cpp_texts.py"
PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain how a bicycle stays upright.",
    "Write a short poem about the sea.",
    "How do I bake a loaf of bread?",
    "Name three differences between cats and dogs.",
    "Summarise the story of Romeo and Juliet.",
    "Why is the sky blue?",
    "Give me tips for learning a new language.",
    "What happens when water boils?",
    "Write an email to my landlord about a broken heater.",
    "Describe a forest in autumn.",
    "How does a computer store numbers?",
    "Tell me a story about a dragon who is afraid of fire.",
    "What should I pack for a week in the mountains?",
    "Who was Marie Curie?",
    "Write a Python function that reverses a list.",
    "What are the benefits of walking every day?",
    "Explain what inflation is to a child.",
    "How are mountains formed?",
    "Suggest a plan for a rainy Sunday.",
)


@dataclass(frozen=True, slots=True)
class Agreement:
    """Shares of equal tokens, and of texts that are equal to the end."""

    tokens: int
    teacher_forced: float
    free_running: float
    same_texts: float


def main(
    model: Annotated[str, typer.Option(help="smollm2, or a GGUF file.")] = SMOLLM2,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens written after each prompt.")] = 50,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each side.")] = os.cpu_count() or 1,
    venvs: Annotated[Path, typer.Option(help="Directory of the peers' environments.")] = Path(".venv-peers"),
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    python = VENVS["llama"].python(venvs.absolute())
    if python is None:
        remedy = f"python -m benchmarks.peers.compare --install --peers llama --venvs {venvs}"
        raise SystemExit(f"llama.cpp is not installed in {venvs}: {remedy}")
    file = smollm2_file() if model == SMOLLM2 else find_gguf(model)
    if file is None:
        raise SystemExit(f"{model} is not a GGUF file")
    written: dict[str, list[list[int]]] = {}
    for name, quantize in SERVED.items():
        config = EngineConfig(
            model=str(file), dtype="float32", quantize=quantize, context=CONTEXT, threads=threads, cpu_prepack=True
        )
        prompts, vocabulary, written[name] = asyncio.run(_continued(config, tokens))
    setup = Setup("", str(file), vocabulary, threads, rows=1, length=CONTEXT, steered=False)
    theirs = _ask(python, setup, prompts, written, tokens)
    found = {name: agreement(ours, theirs["after"][name], theirs["greedy"]) for name, ours in written.items()}
    _show(found, f"{file.name}: trimtab in float32 and {theirs['version']}")
    if out is not None:
        out.write_text(json.dumps({name: asdict(one) for name, one in found.items()}, indent=1) + "\n")
    raise typer.Exit(0 if all(one.teacher_forced >= WANTED for one in found.values()) else 1)


def agreement(ours: list[list[int]], after: list[list[int]], greedy: list[list[int]]) -> Agreement:
    """Our texts, the other side's most likely tokens at their places, and its own texts."""
    return Agreement(
        tokens=sum(map(len, ours)),
        teacher_forced=_equal(ours, after),
        free_running=_equal(ours, greedy),
        same_texts=sum(one == other for one, other in zip(ours, greedy, strict=True)) / len(ours),
    )


def _equal(ours: list[list[int]], theirs: list[list[int]]) -> float:
    pairs = [pair for texts in zip(ours, theirs, strict=True) for pair in zip(*texts, strict=True)]
    return sum(one == other for one, other in pairs) / len(pairs)


async def _continued(config: EngineConfig, tokens: int) -> tuple[list[list[int]], int, list[list[int]]]:
    """The prompts, the size of the vocabulary and the greedy continuations."""
    engine = run_apart(lambda: build_engine(config))
    tokenizer = engine.info.tokenizer
    prompts = [encode_prompt(tokenizer, (Message("user", prompt),)) for prompt in PROMPTS]
    sampling = SamplingParameters(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    requests = [
        GenerationRequest((f"text-{place}",), tuple(prompt), sampling, SteeringPlan())
        for place, prompt in enumerate(prompts)
    ]
    found = await asyncio.gather(*(_text(engine, request) for request in requests))
    await engine.close()
    return prompts, engine.info.vocab_size, list(found)


async def _text(engine: TorchEngine, request: GenerationRequest) -> list[int]:
    written: list[int] = []
    async for event in await engine.submit([request]):
        if isinstance(event, Delta):
            written += event.token_ids
    return written


def _ask(
    python: Path, setup: Setup, prompts: Sequence[list[int]], written: dict[str, list[list[int]]], tokens: int
) -> dict[str, Any]:
    texts = {name: list(zip(prompts, ours, strict=True)) for name, ours in written.items()}
    asked = {"setup": asdict(setup), "texts": texts, "prompts": prompts, "tokens": tokens}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | OFFLINE
    done = subprocess.run(
        [str(python), str(SCRIPT)],
        input=json.dumps(asked),
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _show(found: dict[str, Agreement], title: str) -> None:
    table = Table("", "tokens", "equal, teacher-forced", "equal, free-running", "same texts", title=title)
    for name, one in found.items():
        shares = (one.teacher_forced, one.free_running, one.same_texts)
        table.add_row(name, str(one.tokens), *(f"{share:.1%}" for share in shares))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
