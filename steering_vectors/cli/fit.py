"""`trimtab fit`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from steering_vectors.cli.flags import (
    CALIBRATION,
    DATA,
    METHOD,
    OUTPUT,
    AsJson,
    Columns,
    Device,
    Dtype,
    KlBudget,
    Layers,
    MethodOptions,
    Model,
    Pairs,
    Seed,
    SkipBadRows,
    SkipLongRows,
)
from steering_vectors.cli.inputs import load_data, load_quietly, parse_options

METHODS = "mean-diff, pca, probe, contrast-prompts, bipo, rahf-scit, rahf-dual"


def fit(
    name: Annotated[str, typer.Argument(help="The name of the profile, which is stored as NAME.safetensors.")],
    model: Model,
    data: Pairs,
    method: Annotated[
        str, typer.Option(help=f"The method: {METHODS}. See `trimtab methods`.", rich_help_panel=METHOD)
    ] = "mean-diff",
    option: MethodOptions = None,
    layers: Layers = "auto",
    layering: Annotated[
        str,
        typer.Option(
            help="independent adds each block's direction; incremental adds its difference to the previous block's.",
            rich_help_panel=METHOD,
        ),
    ] = "independent",
    tokens: Annotated[
        str,
        typer.Option(
            help="Read the mean over the `response` tokens, or the `last` token only.", rich_help_panel=METHOD
        ),
    ] = "response",
    gate: Annotated[
        str | None,
        typer.Option(
            help="A file with rows of {prompt, label}: steer only prompts like those with label true.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    kl_budget: KlBudget = 0.1,
    no_calibrate: Annotated[
        bool, typer.Option("--no-calibrate", help="Leave the unit at 1.", rich_help_panel=CALIBRATION)
    ] = False,
    columns: Columns = "",
    skip_bad_rows: SkipBadRows = False,
    skip_long_rows: SkipLongRows = False,
    heldout_fraction: Annotated[
        float, typer.Option(help="Share of the rows that is not trained on.", rich_help_panel=DATA)
    ] = 0.2,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens per forward pass.", rich_help_panel="Model")] = 4096,
    seed: Seed = 0,
    description: Annotated[str, typer.Option(help="A sentence to store in the profile.", rich_help_panel=OUTPUT)] = "",
    out: Annotated[Path, typer.Option(help="The directory to store the profile in.", rich_help_panel=OUTPUT)] = Path(
        "profiles"
    ),
    as_json: AsJson = False,
) -> None:
    """Fit a profile to preference data and store it."""
    from steering_vectors.fitting.fit import FitSettings
    from steering_vectors.fitting.fit import fit as fit_profile
    from steering_vectors.fitting.gates import load_gate_prompts
    from steering_vectors.profiles.files import save_profile
    from steering_vectors.reports.terminal import progress_on_stderr

    settings = FitSettings(
        name=name,
        description=description,
        method=method,
        options=parse_options(option or []),
        layers=layers,
        tokens=cast(Literal["response", "last"], tokens),
        layering=cast(Literal["independent", "incremental"], layering),
        heldout_fraction=heldout_fraction,
        kl_budget=kl_budget,
        calibrate=not no_calibrate,
        gate=None if gate is None else load_gate_prompts(gate),
        seed=seed,
        batch_tokens=batch_tokens,
        skip_long_rows=skip_long_rows,
    )
    pairs = load_data(data, columns, skip_bad_rows)
    lm = load_quietly(model, dtype, device)
    with progress_on_stderr(quiet=as_json) as progress:
        profile = fit_profile(lm, pairs, settings, progress=progress)
    print_fitted(save_profile(profile, out), as_json)


def print_fitted(path: Path, as_json: bool) -> None:
    """Print the summary of a new profile."""
    from steering_vectors.profiles.files import load_profile, profile_summary
    from steering_vectors.reports.terminal import print_fit

    profile = load_profile(path)
    if as_json:
        print(json.dumps({"path": str(path), **profile_summary(profile)}, ensure_ascii=False))
    else:
        print_fit(profile, path)
