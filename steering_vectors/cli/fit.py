"""`trimtab fit`, `trimtab calibrate` and `trimtab show`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal, cast

import typer

import steering_vectors
from steering_vectors.cli import flags
from steering_vectors.reports.terminal import print_fit, print_profile, progress_on_stderr

METHODS = "mean-diff, pca, probe, contrast-prompts, bipo, rahf-scit, rahf-dual"


def fit(
    name: Annotated[str, typer.Argument(help="The name of the profile, which is stored as NAME.safetensors.")],
    model: flags.Model,
    data: flags.Data,
    method: Annotated[str, flags.in_method(help=f"The method: {METHODS}. See `trimtab methods`.")] = "mean-diff",
    option: flags.MethodOptions = None,
    layers: Annotated[str, flags.in_method(help="auto, 12, 10-20 (both ends included) or 3,5,7.")] = "auto",
    layering: Annotated[
        str,
        flags.in_method(
            help="independent adds each block's direction; incremental adds its difference to the previous block's."
        ),
    ] = "independent",
    keep_endings: Annotated[
        bool,
        flags.in_method("--keep-endings", help="Remove from directions what makes texts end sooner or later."),
    ] = False,
    tokens: Annotated[
        str, flags.in_method(help="Read the mean over the `response` tokens, or the `last` token only.")
    ] = "response",
    gate: Annotated[
        str | None,
        flags.in_method(help="A file with rows of {prompt, label}: steer only prompts like those with label true."),
    ] = None,
    kl_budget: flags.KlBudget = 0.1,
    text_tokens: flags.TextTokens = 160,
    text_count: flags.TextCount = 16,
    no_calibrate: Annotated[bool, flags.in_calibration("--no-calibrate", help="Leave the unit at 1.")] = False,
    heldout_fraction: Annotated[float, flags.in_data(help="Share of the rows that is not trained on.")] = 0.2,
    batch_tokens: Annotated[int, flags.in_model(min=1, help="Tokens per forward pass.")] = 4096,
    seed: flags.Seed = 0,
    description: Annotated[str, flags.in_output(help="A sentence to store in the profile.")] = "",
    out: Annotated[Path, flags.in_output(help="The directory to store the profile in.")] = Path("profiles"),
    as_json: flags.AsJson = False,
) -> None:
    """Fit a profile to preference data and store it."""
    settings = steering_vectors.FitSettings(
        name=name,
        description=description,
        method=method,
        options=flags.parse_options(option or []),
        layers=layers,
        tokens=cast(Literal["response", "last"], tokens),
        layering=cast(Literal["independent", "incremental"], layering),
        keep_endings=keep_endings,
        heldout_fraction=heldout_fraction,
        kl_budget=kl_budget,
        text_tokens=text_tokens,
        text_count=text_count,
        calibrate=not no_calibrate,
        gate=None if gate is None else steering_vectors.load_gate_prompts(gate),
        seed=seed,
        batch_tokens=batch_tokens,
        skip_long_rows=data.skip_long_rows,
    )
    pairs, lm = data.load(), model.load()
    with progress_on_stderr(quiet=as_json) as progress:
        profile = steering_vectors.fit(lm, pairs, settings, progress=progress)
    _store(profile, out, as_json)


def calibrate(
    profile: Annotated[
        str, typer.Argument(help="A profile file, or the name of a profile in --profiles; it is replaced.")
    ],
    model: flags.Model,
    data: flags.Data,
    kl_budget: flags.KlBudget = 0.1,
    perplexity_bound: Annotated[
        float,
        flags.in_calibration(help="The safe range ends where perplexity exceeds this many times the unsteered one."),
    ] = 3.0,
    text_tokens: flags.TextTokens = 160,
    text_count: flags.TextCount = 16,
    allow_model_mismatch: Annotated[
        bool, flags.in_model("--allow-model-mismatch", help="Calibrate a profile that was fitted on another model.")
    ] = False,
    seed: flags.Seed = 0,
    profiles: flags.Profiles = Path("profiles"),
    out: Annotated[
        Path | None, flags.in_output(help="Store the profile in this directory instead of replacing it.")
    ] = None,
    as_json: flags.AsJson = False,
) -> None:
    """Set a profile's unit and safe range again, on the prompts of preference data.

    Rows that the profile was trained on are left out.
    """
    path = flags.find_profile(profile, profiles)
    settings = steering_vectors.CalibrationSettings(
        kl_budget=kl_budget,
        perplexity_bound=perplexity_bound,
        text_tokens=text_tokens,
        text_count=text_count,
        seed=seed,
        skip_long_rows=data.skip_long_rows,
        allow_model_mismatch=allow_model_mismatch,
    )
    pairs, stored, lm = data.load(), steering_vectors.load_profile(path), model.load()
    with progress_on_stderr(quiet=as_json) as progress:
        calibrated = steering_vectors.calibrate(lm, stored, pairs, settings, progress=progress)
    _store(calibrated, out or path.parent, as_json)


def show(
    profile: flags.ProfileNames,
    profiles: flags.Profiles = Path("profiles"),
    html: Annotated[
        Path | None, flags.in_output(help="Write an HTML page with plots to this file instead of printing.")
    ] = None,
    as_json: flags.AsJson = False,
) -> None:
    """Print everything that profiles hold except their vectors, or draw it as a page."""
    paths = [flags.find_profile(one, profiles) for one in profile]
    stored = [steering_vectors.load_profile(path) for path in paths]
    if html is not None:
        from steering_vectors.reports.profiles import render_portraits

        flags.write_text(html, render_portraits(stored))
    if as_json:
        found = [_with_path(path, one) for path, one in zip(paths, stored, strict=True)]
        print(json.dumps(found if len(found) > 1 else found[0], ensure_ascii=False))
    elif html is not None:
        print(f"page: {html}")
    else:
        for number, (path, one) in enumerate(zip(paths, stored, strict=True)):
            if number:
                print()
            print_profile(one, path)


def _store(fitted: steering_vectors.Profile, directory: Path, as_json: bool) -> None:
    path = steering_vectors.save_profile(fitted, directory)
    profile = steering_vectors.load_profile(path)
    if as_json:
        print(json.dumps(_with_path(path, profile), ensure_ascii=False))
    else:
        print_fit(profile, path)


def _with_path(path: Path, profile: steering_vectors.Profile) -> dict[str, object]:
    return {"path": str(path), **steering_vectors.profile_summary(profile)}
