"""Structured output: whether steered texts at high temperature obey a JSON schema, and the cost per decode step.

The demo model is served over HTTP and writes orders in JSON, half of them at each end of a profile's safe range. The
package jsonschema, which the server does not use, validates every text that ended by itself. Texts cut off by their
length are counted separately. `decode_steps` measures the cost.

    python -m benchmarks.speed.structured [--samples 200] [--pairs 10] [--shape smollm2] [--json FILE]
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from jsonschema import Draft202012Validator
from rich.console import Console
from rich.table import Table

from benchmarks.common.decode_steps import measure, model_of_shape
from benchmarks.common.order_schemas import order
from benchmarks.common.serving import Server, serving
from benchmarks.quality.dose_response import PREFERENCES, heldout_prompts
from steering_vectors import Profile, fit, load_model, load_pairs, load_profile, save_profile

PROMPTS = 20
MAX_CUT = 0.02  # share of texts cut off by their length


def main(
    samples: Annotated[int, typer.Option(help="Number of texts to validate, half at each sign; 0 skips this.")] = 200,
    profile: Annotated[Path | None, typer.Option(help="A profile of the demo model; `warm` is fitted if none.")] = None,
    temperature: Annotated[float, typer.Option(help="Temperature of the validated texts.")] = 1.5,
    max_tokens: Annotated[int, typer.Option(help="Maximum tokens of a validated text.")] = 460,
    pairs: Annotated[int, typer.Option(help="Number of timed pairs; 0 skips this.")] = 10,
    rows: Annotated[int, typer.Option(help="Rows of a timed step.")] = 16,
    steps: Annotated[int, typer.Option(help="Steps of a timed run.")] = 64,
    shape: Annotated[str, typer.Option(help="Model to time: demo, DIR, or smollm2 with random weights.")] = "demo",
    tokenizer: Annotated[Path | None, typer.Option(help="Its tokenizer: a directory, or a text to train on.")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    results: dict[str, Any] = {}
    if samples:
        results["obedience"] = obedience(profile, samples, temperature, max_tokens)
        show_obedience(results["obedience"])
    if pairs:
        results["cost"] = measure(model_of_shape(shape, tokenizer), rows=rows, steps=steps, pairs=pairs)
        show_cost(results["cost"], shape)
    if out is not None:
        out.write_text(json.dumps(results, indent=1))
    raise typer.Exit(0 if all(one["holds"] for one in results.get("obedience", {}).values()) else 1)


def obedience(file: Path | None, samples: int, temperature: float, max_tokens: int) -> dict[str, Any]:
    """The results of the texts, by strength."""
    profile = load_profile(file) if file else fit(load_model("demo"), None, load_pairs("demo:warm"), name="warm")
    with tempfile.TemporaryDirectory() as directory:
        save_profile(profile, Path(directory))
        with serving("demo", Path(directory), slots=16) as server:
            return {
                f"{strength:+g}": judge(ask(server, profile, strength, samples // 2, temperature, max_tokens))
                for strength in (-profile.max_strength, profile.max_strength)
            }


def ask(
    server: Server, profile: Profile, strength: float, count: int, temperature: float, max_tokens: int
) -> list[dict[str, Any]]:
    prompts = heldout_prompts(PREFERENCES / "warm.heldout.jsonl", PROMPTS)
    answers = server.generate_all(
        [
            {
                "messages": prompts[seed % PROMPTS],
                "profile": profile.name,
                "strength": strength,
                "temperature": temperature,
                "seed": seed,
                "max_tokens": max_tokens,
                "guided_json": order(),
            }
            for seed in range(count)
        ]
    )
    if any(answer["steering"][0]["strength"] != strength for answer in answers):
        raise RuntimeError("a text was not steered as requested")
    return answers


def judge(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Finish reasons, the faults of texts that ended by themselves, and lengths."""
    endings = Counter(answer["finish_reason"] for answer in answers)
    ended = [answer["text"] for answer in answers if answer["finish_reason"] == "stop"]
    faults = [(text, found) for text in ended if (found := fault(text)) is not None]
    tokens = sorted(answer["usage"]["completion_tokens"] for answer in answers)
    return {
        "endings": dict(endings),
        "distinct": len(set(ended)),
        "faults": faults,
        "tokens": {"median": median(tokens), "longest": tokens[-1]},
        "holds": not faults and set(endings) <= {"stop", "length"} and endings["length"] < MAX_CUT * len(answers),
        "examples": ended[:3],
    }


def fault(text: str) -> str | None:
    """The schema violation of a text, or None."""
    try:
        found = next(Draft202012Validator(order()).iter_errors(json.loads(text)), None)
    except json.JSONDecodeError as error:
        return str(error)
    return None if found is None else f"{found.json_path}: {found.message}"


def show_obedience(results: dict[str, Any]) -> None:
    table = Table(title="Texts with a schema, by strength")
    for column in ("strength", "ended", "obey", "distinct", "cut off", "other", "tokens (longest)", "holds"):
        table.add_column(column, justify="right")
    for strength, one in results.items():
        endings = Counter(one["endings"])
        ended, cut = endings["stop"], endings["length"]
        table.add_row(
            strength,
            str(ended),
            str(ended - len(one["faults"])),
            str(one["distinct"]),
            str(cut),
            str(endings.total() - ended - cut),
            f"{one['tokens']['median']:g} ({one['tokens']['longest']})",
            "yes" if one["holds"] else "no",
        )
    Console(width=120).print(table)
    for one in results.values():
        for text, found in one["faults"]:
            print(f"{found}: {text}", file=sys.stderr)


def show_cost(cost: dict[str, Any], shape: str) -> None:
    known = cost["vocabulary"]
    table = Table(
        title=f"A decode step of {cost['rows']} rows, ms ({shape}; vocabulary {known['model']}, tokenizer "
        f"{known['tokenizer']}; medians of {cost['pairs']} pairs)"
    )
    for column in ("rows have", "clock", "without", "with", "added (range)", "ratio"):
        table.add_column(column, justify="left" if column in ("rows have", "clock") else "right")
    for name, clocks in cost["found"].items():
        for clock, one in clocks.items():
            low, high = one["added_range"]
            table.add_row(
                name,
                clock,
                f"{one['free']:.2f}",
                f"{one['constrained']:.2f}",
                f"{one['added']:.2f} ({low:.2f}–{high:.2f})",
                f"{one['ratio']:.3f}",
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
