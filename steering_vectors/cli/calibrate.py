"""`trimtab calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steering_vectors.cli.fit import print_fitted
from steering_vectors.cli.flags import (
    CALIBRATION,
    MODEL,
    OUTPUT,
    AsJson,
    Columns,
    Device,
    Dtype,
    KlBudget,
    Model,
    Pairs,
    Profiles,
    Seed,
    SkipBadRows,
    SkipLongRows,
)
from steering_vectors.cli.inputs import find_profile, load_data, load_quietly


def calibrate(
    profile: Annotated[
        str, typer.Argument(help="A profile file, or the name of a profile in --profiles; it is replaced.")
    ],
    model: Model,
    data: Pairs,
    kl_budget: KlBudget = 0.1,
    perplexity_bound: Annotated[
        float,
        typer.Option(
            help="The safe range ends where perplexity exceeds this many times the unsteered one.",
            rich_help_panel=CALIBRATION,
        ),
    ] = 3.0,
    columns: Columns = "",
    skip_bad_rows: SkipBadRows = False,
    skip_long_rows: SkipLongRows = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    allow_model_mismatch: Annotated[
        bool,
        typer.Option(
            "--allow-model-mismatch",
            help="Calibrate a profile that was fitted on another model.",
            rich_help_panel=MODEL,
        ),
    ] = False,
    seed: Seed = 0,
    profiles: Profiles = Path("profiles"),
    out: Annotated[
        Path | None,
        typer.Option(help="Store the profile in this directory instead of replacing it.", rich_help_panel=OUTPUT),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Set a profile's unit and safe range again, on the prompts of preference data.

    Rows that the profile was trained on are left out.
    """
    from steering_vectors.fitting.calibration import CalibrationSettings
    from steering_vectors.fitting.calibration import calibrate as calibrate_profile
    from steering_vectors.profiles.files import load_profile, save_profile
    from steering_vectors.reports.terminal import progress_on_stderr

    path = find_profile(profile, profiles)
    settings = CalibrationSettings(
        kl_budget=kl_budget,
        perplexity_bound=perplexity_bound,
        seed=seed,
        skip_long_rows=skip_long_rows,
        allow_model_mismatch=allow_model_mismatch,
    )
    pairs, stored = load_data(data, columns, skip_bad_rows), load_profile(path)
    lm = load_quietly(model, dtype, device)
    with progress_on_stderr(quiet=as_json) as progress:
        calibrated = calibrate_profile(lm, stored, pairs, settings, progress=progress)
    print_fitted(save_profile(calibrated, out or path.parent), as_json)
