"""`trimtab methods`, which lists the methods of `trimtab fit`, and `trimtab methods compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import steering_vectors
from steering_vectors.cli import flags
from steering_vectors.errors import FitError
from steering_vectors.reports.comparison import print_comparison, render_comparison
from steering_vectors.reports.terminal import progress_on_stderr


def methods(context: typer.Context, as_json: flags.AsJson = False) -> None:
    """List the methods of `trimtab fit`, with their options, defaults and papers."""
    if context.invoked_subcommand is not None:
        return
    from steering_vectors.methods import method_named, method_names

    found = [method_named(name).describe() for name in method_names()]
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    console = Console(highlight=False)
    table = Table("method", "direction", "paper", "blocks with --layers auto", "weights")
    options = Table("method", "option", "default", "meaning")
    for method in found:
        weights = "yes" if method["weights"] else "no"
        table.add_row(method["name"], escape(method["direction"]), escape(method["paper"]), method["layers"], weights)
        for number, option in enumerate(method["options"]):
            default = escape(str(option["default"])) or '""'
            options.add_row(method["name"] if number == 0 else "", option["name"], default, escape(option["help"]))
    console.print(table)
    console.print("h is a block's output, q a prompt, r a response; p⁺ and p⁻ are an instruction and its opposite.")
    console.print(options)
    console.print("Set an option with -o KEY=VALUE.")


def compare(
    model: flags.Model,
    data: flags.Data,
    chosen: Annotated[
        str, flags.in_method("--methods", help="The methods to compare, comma-separated; all if empty.")
    ] = "",
    option: Annotated[
        list[str] | None,
        flags.in_method("--option", "-o", help="An option of one method, as METHOD.KEY=VALUE; can be repeated."),
    ] = None,
    goal: Annotated[
        str, flags.in_method(help="What the data prefers, for methods that use instructions, as a profile's name.")
    ] = "helpful",
    layers: Annotated[str, flags.in_method(help="auto, 12, 10-20 (both ends included) or 3,5,7.")] = "auto",
    kl_budget: flags.KlBudget = 0.1,
    heldout_fraction: Annotated[float, flags.in_data(help="Share of the rows that is not trained on.")] = 0.2,
    rows: Annotated[int, flags.in_measurement(min=8, help="The maximum number of held-out rows.")] = 256,
    randoms: Annotated[int, flags.in_measurement(min=0, help="The number of random directions at the same KL.")] = 3,
    seed: flags.Seed = 0,
    out: Annotated[Path | None, flags.in_output(help="Store the profiles in this directory.")] = None,
    report: flags.Report = None,
    as_json: flags.AsJson = False,
) -> None:
    """Fit several methods to the same data, and compare their effect at equal KL, their costs and their time."""
    settings = steering_vectors.ComparisonSettings(
        methods=[name.strip() for name in chosen.split(",") if name.strip()],
        options=_by_method(flags.parse_options(option or [])),
        goal=goal,
        layers=layers,
        heldout_fraction=heldout_fraction,
        kl_budget=kl_budget,
        rows=rows,
        randoms=randoms,
        seed=seed,
        skip_long_rows=data.skip_long_rows,
    )
    pairs, lm = data.load(), model.load()
    with progress_on_stderr(quiet=as_json) as progress:
        found, profiles = steering_vectors.compare_methods(lm, pairs, settings, progress=progress)
    for profile in profiles if out is not None else ():
        steering_vectors.save_profile(profile, out or Path())
    if report is not None:
        flags.write_text(report, render_comparison(found))
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    print_comparison(found)
    if report is not None:
        print(f"report: {report}")


def _by_method(options: dict[str, str]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for key, value in options.items():
        method, dot, name = key.partition(".")
        if not dot:
            raise FitError(f"--option {key}={value} names no method; write METHOD.{key}={value}")
        found.setdefault(method, {})[name] = value
    return found
