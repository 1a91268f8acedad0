"""Whether a server's first requests wait longer between tokens than later ones, and the memory that they take.

    python -m benchmarks.speed.first_requests [--model smollm2] [--requests 8] [--rounds 13] [--json FILE]

The engine runs in this process, with the settings of `trimtab serve`. In each round so many requests arrive at once,
with prompts that share nothing. They take slots that hold no text yet in the first round, and in later ones move the
texts of earlier rounds to such slots. The gap is the longest wait between two tokens of a request, in steps: over the
median wait of the last round. Page faults and processor time are those of the process, and memory is its resident set
after the round. Texts of so many tokens need the memory that is printed beside, for their keys and values.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from server.engines.protocol import Delta, GenerationRequest, SamplingParameters
from server.engines.torch.build import build_engine
from server.engines.torch.engine import TorchEngine
from server.settings import load_settings

MIB = 2**20
_ids = itertools.count()


@dataclass(frozen=True, slots=True)
class Round:
    """What one round took; waits in milliseconds, processor time in seconds, `resident` in bytes after it."""

    longest_wait: float
    median_wait: float
    faults: int
    cpu: float
    resident: int


def main(
    model: Annotated[str, typer.Option(help="The model, as in `trimtab serve`.")] = "smollm2",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    requests: Annotated[int, typer.Option(help="Requests of a round, all at once.")] = 8,
    rounds: Annotated[int, typer.Option(help="Rounds, one after the other.")] = 13,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 16,
    tokens: Annotated[int, typer.Option(help="Tokens of a completion.")] = 34,
    slots: Annotated[int, typer.Option(help="Rows of the server.")] = 16,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = torch.get_num_threads(),
    prepack: Annotated[bool | None, typer.Option(help="As in `trimtab serve`.")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    given = {"model": model, "dtype": dtype, "slots": slots, "threads": threads, "cpu_prepack": prepack}
    settings = load_settings({name: value for name, value in given.items() if value is not None})
    engine = build_engine(settings.engine_config())
    ready = resident()
    found = asyncio.run(measured(engine, requests, rounds, prompt, tokens))
    layers = engine._runner.cache.layers if hasattr(engine._runner, "cache") else []  # type: ignore[attr-defined]
    position = sum(states[0, :, 0].nbytes for layer in layers for states in (layer.keys, layer.values))
    figures = {
        **given,
        "path": engine.info.path,
        "context": engine.info.context,
        "requests": requests,
        "tokens": prompt + tokens,
        "bytes_of_text": position * (prompt + tokens),
        "ready": ready,
        "rounds": [asdict(one) for one in found],
        "gaps": gaps(found),
    }
    show(figures)
    if out is not None:
        out.write_text(json.dumps(figures, indent=2) + "\n")


def gaps(rounds: list[Round]) -> list[float]:
    """The longest wait of each round, in steps of the last one."""
    return [round(one.longest_wait / rounds[-1].median_wait, 2) for one in rounds]


async def measured(engine: TorchEngine, requests: int, rounds: int, prompt: int, tokens: int) -> list[Round]:
    try:
        return [
            await one_round(engine, [prompt_of(row, prompt, engine.info.vocab_size) for row in rows], tokens)
            for rows in (range(first, first + requests) for first in range(0, requests * rounds, requests))
        ]
    finally:
        await engine.close()


def prompt_of(row: int, length: int, vocabulary: int) -> list[int]:
    """Tokens that no two rows begin with, as long as there are fewer rows than tokens."""
    return [(row + 7 * place) % vocabulary for place in range(length)]


async def one_round(engine: TorchEngine, prompts: list[list[int]], tokens: int) -> Round:
    faults, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
    waits = await asyncio.gather(*(waits_of(engine, prompt, tokens) for prompt in prompts))
    taken = [wait for one in waits for wait in one]
    return Round(
        longest_wait=max(taken),
        median_wait=median(taken),
        faults=resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults,
        cpu=time.process_time() - cpu,
        resident=resident(),
    )


async def waits_of(engine: TorchEngine, prompt: list[int], tokens: int) -> list[float]:
    """Milliseconds from each token of a completion to the next."""
    sampling = SamplingParameters(temperature=0, max_tokens=tokens, ignore_eos=True)
    request = GenerationRequest((f"request-{next(_ids)}",), tuple(prompt), sampling)
    times = [time.perf_counter() async for event in await engine.submit([request]) if isinstance(event, Delta)]
    return [1e3 * (after - before) for before, after in itertools.pairwise(times)]


def resident() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def show(figures: dict[str, Any]) -> None:
    title = f"{figures['model']}, {figures['path']}, {figures['slots']} slots of {figures['context']} tokens"
    table = Table("requests", "gap, steps", "longest wait", "median wait", "page faults", "CPU s", "MiB", title=title)
    table.add_row("ready", *[""] * 5, f"{figures['ready'] / MIB:.0f}")
    for place, (one, gap) in enumerate(zip(figures["rounds"], figures["gaps"], strict=True)):
        first, count = place * figures["requests"], figures["requests"]
        waits = (f"{one[name]:.1f} ms" for name in ("longest_wait", "median_wait"))
        memory = f"{one['resident'] / MIB:.0f}"
        table.add_row(
            f"{first + 1} to {first + count}", f"{gap:.2f}", *waits, str(one["faults"]), f"{one['cpu']:.2f}", memory
        )
    console = Console(width=120)
    console.print(table)
    size = figures["bytes_of_text"] / MIB
    console.print(f"keys and values of a text of {figures['tokens']} tokens: {size:.2f} MiB")


if __name__ == "__main__":
    typer.run(main)
