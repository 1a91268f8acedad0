"""The cost of steering per decode step, by rows, context and number of different steerings.

    python -m benchmarks.speed.throughput [--model smollm2-135m] [--rows 1,16] [--contexts 32,512] [--steerings 1,4,16]
    python -m benchmarks.speed.throughput --device cuda --model llama-3.1-8b --rows 1,8,32 --steerings 1,8,64 --generate

The engine runs in this process. Every case is measured in pairs: the same rows unsteered and steered at every block, in
alternating order. Each pair has new prompts, computed before it for both sides, because only decode steps are timed.
The first pair warms up. The ratio is unsteered over steered time: at 1 steering is free, at .98 it costs 2 %. It is the
median over pairs of the median step. The CPU ratio is that of the engine's thread, which other programs disturb less.
Two cases are always added: in `changing`, every row's strength changes at every step; in `256 loaded`, the steerings
come from 256 profiles. The floor is that of `benchmarks.common.floors`. `--generate` adds the median step of
transformers' generate with hooks and one steering for all rows.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.common.decode_steps import Step, TimedEngine
from benchmarks.common.floors import Cost, Device
from benchmarks.common.shapes import SHAPES, model_of
from benchmarks.speed.hooked_generate import milliseconds
from server.engines.protocol import GenerationRequest, PlanTerm, SamplingParameters, SteeringPlan, StrengthSchedule
from server.settings import load_settings
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.profile import Profile
from steering_vectors.runtime.cpu.packing import pack
from steering_vectors.runtime.cpu.threads import run_apart

LOADED = 256
_ids = itertools.count()


def main(
    model: Annotated[
        str, typer.Option(help=f"demo, a directory, a GGUF file, or one of {', '.join(SHAPES)}.")
    ] = "smollm2-135m",
    rows: Annotated[str, typer.Option(help="Rows of a batch, comma-separated.")] = "1,4,16",
    contexts: Annotated[str, typer.Option(help="Tokens of each prompt, comma-separated.")] = "32,512",
    steerings: Annotated[str, typer.Option(help="Different steerings, comma-separated.")] = "1,4,16",
    steps: Annotated[int, typer.Option(help="Tokens of a run.")] = 32,
    pairs: Annotated[int, typer.Option(help="Pairs of a case.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = torch.get_num_threads(),
    prepack: Annotated[bool, typer.Option(help="Serve as with --cpu-prepack, on a CPU.")] = True,
    quantize: Annotated[str | None, typer.Option(help="Serve as with --quantize: int8, int4 or gguf.")] = None,
    dtype: Annotated[str, typer.Option(help="The data type: bfloat16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="Where the model runs, as torch names it.")] = "cpu",
    graphs: Annotated[bool, typer.Option(help="On CUDA, replay steps as graphs if possible.")] = True,
    generate: Annotated[bool, typer.Option(help="Also measure generate with hooks.")] = False,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw time per step against rows and context here.")] = None,
) -> None:
    torch.set_num_threads(threads)
    prepack = prepack and device == "cpu"
    numbers = getattr(torch, dtype)
    language_model, cost = run_apart(
        lambda: _loaded(model, prepack=prepack, quantize=quantize, device=device, dtype=numbers)
    )
    measured = Device.measured(language_model.device, language_model.dtype)
    profiles = [_profile(language_model, seed) for seed in range(LOADED)]
    cases = [(batch, context) for batch in _numbers(rows) for context in _numbers(contexts)]
    found = []
    for batch, context in track(cases, description="measuring"):
        sides = _sides(profiles, batch, steps, _numbers(steerings))
        floor = cost.floor_ms(measured, rows=batch, context=context + steps // 2)
        beside: dict[str, Any] = {"floor_ms": round(floor, 3)}
        if generate:
            prompts = [_prompt(row, context) for row in range(batch)]
            spent = milliseconds(language_model, profiles[0], prompts, steps=steps, repeats=pairs)
            beside["generate_ms"] = round(spent, 3)
        static = None if graphs else False
        cases_of = asyncio.run(_measure(language_model, profiles, sides, batch, context, steps, pairs, static))
        found += [{**one, **beside} for one in cases_of]
    figures = {
        "model": model,
        "dtype": dtype,
        "device": _described(language_model.device),
        "bandwidth_gb_s": round(measured.bandwidth / 1e9, 1),
        "rate_gop_s": round(measured.rate / 1e9),
        "threads": threads,
        "prepack": prepack,
        "quantize": quantize,
        "pairs": pairs,
        "steps": steps,
        "cases": found,
    }
    _show(figures)
    if out is not None:
        out.write_text(json.dumps(figures, indent=1) + "\n")
    if plot is not None:
        _draw(figures, plot)


def _described(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _loaded(
    model: str, *, prepack: bool, quantize: str | None, device: str, dtype: torch.dtype
) -> tuple[LanguageModel, Cost]:
    language_model = model_of(model, device=device, dtype=dtype)
    cost = Cost.of(language_model, quantize)
    if prepack or quantize is not None:
        pack(language_model.model, load_settings({"quantize": quantize}).quantize, dtype=dtype)
    return language_model, cost


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _profile(model: LanguageModel, seed: int) -> Profile:
    """A profile with a small direction at every block."""
    generator = torch.Generator().manual_seed(seed)
    directions = {
        layer: 1e-2 * torch.randn(model.hidden_size, generator=generator) for layer in range(model.num_layers)
    }
    return Profile(f"p{seed}", model.identity, directions, method="random", version=f"{seed:064d}")


def _sides(profiles: list[Profile], rows: int, steps: int, steerings: list[int]) -> dict[str, list[SteeringPlan]]:
    """The rows' plans, by what the case is called."""

    def of(profile: Profile, schedule: StrengthSchedule | None = None) -> SteeringPlan:
        return SteeringPlan((PlanTerm(profile.name, profile.version, schedule=schedule),))

    sides = {
        f"{count} steerings": [of(profiles[row % count]) for row in range(rows)] for count in steerings if count <= rows
    }
    sides[f"{LOADED} loaded"] = [of(profiles[(37 * row) % LOADED]) for row in range(rows)]
    line = StrengthSchedule(((0, 0.5), (steps, 1.5)), "linear")
    sides["changing"] = [of(profiles[row], line) for row in range(rows)]
    return sides


async def _measure(
    model: LanguageModel,
    profiles: list[Profile],
    sides: dict[str, list[SteeringPlan]],
    rows: int,
    context: int,
    steps: int,
    pairs: int,
    static: bool | None,
) -> list[dict[str, Any]]:
    engine = TimedEngine(model, slots=rows, context=context + steps + 1, cuda_graphs=static)
    plain = [SteeringPlan()] * rows
    try:
        for profile in profiles:
            await engine.load_profile(profile)
        found = []
        for name, plans in sides.items():
            taken = []
            for pair in range(pairs + 1):
                await _write(engine, plain, context, steps, pair)  # computes the prompts, which both sides find
                order = (plain, plans) if pair % 2 else (plans, plain)
                times = {id(side): await _run(engine, side, context, steps, pair) for side in order}
                taken.append((times[id(plain)], times[id(plans)]))
            path = engine.info.path
            found.append({"rows": rows, "context": context, "case": name, "path": path, **_compared(taken[1:])})
    finally:
        await engine.close()
    return found


def _compared(pairs: list[tuple[Step, Step]]) -> dict[str, Any]:
    ratios = sorted(plain.wall / steered.wall for plain, steered in pairs)
    return {
        "unsteered_ms": round(median(plain.wall for plain, _ in pairs), 3),
        "steered_ms": round(median(steered.wall for _, steered in pairs), 3),
        "ratio": round(median(ratios), 4),
        "cpu_ratio": round(median(plain.cpu / steered.cpu for plain, steered in pairs), 4),
        "ratio_range": [round(ratios[0], 4), round(ratios[-1], 4)],
        "pairs_ms": [[round(plain.wall, 3), round(steered.wall, 3)] for plain, steered in pairs],
    }


async def _run(engine: TimedEngine, plans: list[SteeringPlan], context: int, steps: int, pair: int) -> Step:
    engine.steps.clear()
    await _write(engine, plans, context, steps, pair)
    return Step(median(step.wall for step in engine.steps), median(step.cpu for step in engine.steps))


async def _write(engine: TimedEngine, plans: list[SteeringPlan], context: int, steps: int, pair: int) -> None:
    prompts = [_prompt(len(plans) * pair + row, context) for row in range(len(plans))]
    requests = (_request(prompt, one, steps) for prompt, one in zip(prompts, plans, strict=True))
    await asyncio.gather(*(_drain(engine, request) for request in requests))


def _request(prompt: list[int], plan: SteeringPlan, steps: int) -> GenerationRequest:
    sampling = SamplingParameters(temperature=0, max_tokens=steps, ignore_eos=True)
    return GenerationRequest((f"run-{next(_ids)}",), tuple(prompt), sampling, plan)


def _prompt(seed: int, context: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(token) for token in torch.randint(3, 1000, (context,), generator=generator)]


async def _drain(engine: TimedEngine, request: GenerationRequest) -> None:
    async for _ in await engine.submit([request]):
        pass


def _show(figures: dict[str, Any]) -> None:
    heads = ("rows", "context", "case", "floor", "without", "with, ms", "ratio", "range", "CPU ratio", "generate")
    table = Table(*heads, title=_title(figures))
    for one in figures["cases"]:
        low, high = one["ratio_range"]
        names = ("rows", "context", "case", "floor_ms", "unsteered_ms", "steered_ms", "ratio")
        cells = (*(one[name] for name in names), f"{low}–{high}", one["cpu_ratio"], one.get("generate_ms", ""))
        table.add_row(*map(str, cells))
    Console(width=120).print(table)


def _title(figures: dict[str, Any]) -> str:
    rates = f"{figures['bandwidth_gb_s']} GB/s, {figures['rate_gop_s']} billion operations/s"
    return f"{figures['model']}, {figures['cases'][0]['path']}, {rates}"


def _draw(figures: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for axis, (key, other) in zip(axes, (("rows", "context"), ("context", "rows")), strict=True):
        for value in sorted({one[other] for one in figures["cases"]}):
            chosen = [one for one in figures["cases"] if one[other] == value]
            places = sorted({one[key] for one in chosen})
            taken = [median(one["steered_ms"] for one in chosen if one[key] == place) for place in places]
            floors = [next(one["floor_ms"] for one in chosen if one[key] == place) for place in places]
            (line,) = axis.plot(places, taken, marker="o", label=f"{other} {value}")
            axis.plot(places, floors, linestyle=":", color=line.get_color())
        axis.set(xlabel=key, ylabel="ms per step, steered; dotted: the floor", ylim=(0, None))
        axis.legend(frameon=False, fontsize="small")
    figure.savefig(path)


if __name__ == "__main__":
    typer.run(main)
