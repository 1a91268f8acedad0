"""The offline commands, `fit`, `calibrate`, `evaluate`, `distill` and `show`, for the root command `trimtab` to mount.

Owns flags, exit codes and what goes to which stream: progress and messages to stderr, the answer to stdout. Importing
it loads no model code, so that help answers at once. What the commands do is in `commands`.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer

from steering_vectors.cli.actions import (
    ModelSource,
    bake_and_save,
    distill_and_save,
    evaluate_all,
    fit_and_save,
    load_data,
    print_evaluations,
    print_fitted,
    print_made,
    recalibrate_and_save,
    show_profiles,
)
from steering_vectors.cli.flags import (
    AsJson,
    Columns,
    Device,
    Dtype,
    KlBudget,
    Model,
    ProfileName,
    ProfileNames,
    Profiles,
    Seed,
    SkipBadRows,
    SkipLongRows,
)
from steering_vectors.errors import FitError, ProfileError, TrimtabError

FAILED, INTERRUPTED = 2, 130
STOPPED = "interrupted: nothing was stored; the same command begins anew, and tuning goes on from its last checkpoint"
METHODS_HELP = "mean-diff, pca, probe, contrast-prompts, bipo, rahf-scit or rahf-dual."

SUITE_OPTIONS = {
    "preference": ("data", "rows", "randoms", "reward_samples", "columns", "skip_bad_rows", "skip_long_rows"),
    "trust": ("trust_data", "verticals", "toxicity", "trust_rows", "trust_randoms"),
}

P = ParamSpec("P")


def register(app: typer.Typer) -> None:
    """Add the commands `fit`, `calibrate`, `evaluate`, `distill` and `show` to a typer app."""
    app.command("fit", help="Fit a profile to preference data and store it.")(fit_command)
    app.command("calibrate", help="Set a profile's unit and safe range anew.")(calibrate_command)
    app.command("evaluate", help="Measure what profiles do to held-out preferences and to trust, and what it costs.")(
        evaluate_command
    )
    app.command("distill", help="Turn a profile into a LoRA, or (--bake) into the model's weights.")(distill_command)
    app.command("show", help="Print or draw everything that profiles hold.")(show_command)


def reporting_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Turn an error raised on purpose into one line on stderr and exit code 2, a Ctrl-C into one and 130."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except TrimtabError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(FAILED) from error
        except KeyboardInterrupt as stop:
            print(STOPPED, file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from stop

    return run


@reporting_errors
def fit_command(
    name: Annotated[str, typer.Argument(help="The profile's name: it is stored as NAME.safetensors.")],
    model: Model,
    data: Annotated[str, typer.Option(help="Preference data: a file, `hf:NAME[:split]`, or `demo:warm` and its like.")],
    method: Annotated[str, typer.Option(help=METHODS_HELP)] = "mean-diff",
    layers: Annotated[str, typer.Option(help="auto, 12, 10-20 (both ends included) or 3,5,7.")] = "auto",
    tokens: Annotated[str, typer.Option(help="Read the mean over the `response`, or its `last` token.")] = "response",
    out: Profiles = Path("profiles"),
    layering: Annotated[str, typer.Option(help="independent or incremental.")] = "independent",
    dtype: Dtype = "auto",
    device: Device = "cpu",
    kl_budget: KlBudget = 0.1,
    seed: Seed = 0,
    heldout_fraction: Annotated[float, typer.Option(help="Share of the rows that is not trained on.")] = 0.2,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens per forward pass.")] = 4096,
    columns: Columns = "",
    skip_bad_rows: SkipBadRows = False,
    skip_long_rows: SkipLongRows = False,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="An option of the method, KEY=VALUE; may be repeated.")
    ] = None,
    description: Annotated[str, typer.Option(help="A sentence to store with it.")] = "",
    no_calibrate: Annotated[bool, typer.Option("--no-calibrate", help="Leave the unit at 1.")] = False,
    gate: Annotated[
        str | None, typer.Option(help="Rows of {prompt, label}: steer only where a prompt is like those labelled true.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    options = {
        "name": name, "method": method, "layers": layers, "tokens": tokens, "layering": layering, "seed": seed,
        "kl_budget": kl_budget, "heldout_fraction": heldout_fraction, "batch_tokens": batch_tokens,
        "skip_long_rows": skip_long_rows, "description": description, "calibrate": not no_calibrate,
        "options": parse_options(option or []),
    }  # fmt: skip
    pairs = load_data(data, columns, skip_bad_rows)
    path = fit_and_save(ModelSource(model, dtype, device), pairs, out, options, gate, quiet=as_json)
    print_fitted(path, as_json)


@reporting_errors
def calibrate_command(
    profile: Annotated[str, typer.Argument(help="A profile's file, or its name in --profiles; it is replaced.")],
    model: Model,
    data: Annotated[str, typer.Option(help="Whose prompts to calibrate on, as in fit; trained rows are left out.")],
    profiles: Profiles = Path("profiles"),
    out: Annotated[Path | None, typer.Option(help="Store it in this directory instead.")] = None,
    kl_budget: KlBudget = 0.1,
    perplexity_bound: Annotated[
        float, typer.Option(help="Safe strengths keep perplexity within so many times the unsteered.")
    ] = 3.0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    seed: Seed = 0,
    columns: Columns = "",
    skip_bad_rows: SkipBadRows = False,
    skip_long_rows: SkipLongRows = False,
    allow_model_mismatch: Annotated[
        bool, typer.Option("--allow-model-mismatch", help="Calibrate a profile that was made for another model.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    path = find_profile(profile, profiles)
    options = {
        "kl_budget": kl_budget, "perplexity_bound": perplexity_bound, "seed": seed,
        "skip_long_rows": skip_long_rows, "allow_model_mismatch": allow_model_mismatch,
    }  # fmt: skip
    pairs = load_data(data, columns, skip_bad_rows)
    path = recalibrate_and_save(
        path, ModelSource(model, dtype, device), pairs, out or path.parent, options, quiet=as_json
    )
    print_fitted(path, as_json)


@reporting_errors
def evaluate_command(
    context: typer.Context,
    profile: ProfileNames,
    model: Model,
    data: Annotated[str, typer.Option(help="Preference data, as in fit; rows that were trained on are left out.")] = "",
    suite: Annotated[str, typer.Option(help="preference, trust or all.")] = "preference",
    trust_data: Annotated[
        Path | None,
        typer.Option(help="Folder with rtp/*.jsonl, crows-pairs/*.csv, ethics/*.csv and truthfulqa/*.json."),
    ] = None,
    verticals: Annotated[
        str, typer.Option(help="Which of trust to measure, comma-separated.")
    ] = "toxicity,bias,ethics,truthfulness,privacy",
    toxicity: Annotated[
        str, typer.Option(help="Scorer: `rtp` (fitted to that file), a classifier's directory, or module:callable.")
    ] = "rtp",
    trust_rows: Annotated[int, typer.Option(min=8, help="Rows to read of each vertical, at most.")] = 200,
    trust_randoms: Annotated[int, typer.Option(min=0, help="Random directions to compare trust with.")] = 5,
    profiles: Profiles = Path("profiles"),
    report: Annotated[Path | None, typer.Option(help="Write a page with plots here.")] = None,
    strengths: Annotated[str, typer.Option(help="Comma-separated; 0 must be among them.")] = "-1,-0.5,0,0.5,1",
    rows: Annotated[int, typer.Option(min=8, help="Held-out rows to read, at most.")] = 256,
    randoms: Annotated[int, typer.Option(min=0, help="Random directions to compare with.")] = 10,
    reward_samples: Annotated[
        int, typer.Option(min=0, help="Texts per prompt for the optimum of reward against KL; 0 leaves it out.")
    ] = 64,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    seed: Seed = 0,
    columns: Columns = "",
    skip_bad_rows: SkipBadRows = False,
    skip_long_rows: SkipLongRows = False,
    as_json: AsJson = False,
) -> None:
    check_suite(context, suite)
    files = [find_profile(one, profiles) for one in profile]
    shared = {"strengths": parse_strengths(strengths), "seed": seed}
    options = {**shared, "rows": rows, "randoms": randoms, "reward_samples": reward_samples}
    options["skip_long_rows"] = skip_long_rows
    trust = {
        **shared, "folder": trust_data, "verticals": tuple(one.strip() for one in verticals.split(",")),
        "toxicity": toxicity, "rows": trust_rows, "randoms": trust_randoms,
    }  # fmt: skip
    pairs = load_data(data, columns, skip_bad_rows) if suite != "trust" else None
    found = evaluate_all(
        files,
        ModelSource(model, dtype, device),
        pairs,
        options,
        trust if suite != "preference" else None,
        quiet=as_json,
    )
    print_evaluations(found, report, as_json)


@reporting_errors
def distill_command(
    model: Model,
    out: Annotated[Path, typer.Option(help="The folder to write: an adapter, or with --bake a model.")],
    profile: ProfileName = "",
    method: Annotated[
        str, typer.Option(help="Instead of a profile: rahf-scit or rahf-dual, whose difference each token learns.")
    ] = "",
    data: Annotated[str, typer.Option(help="Whose responses the LoRA is fitted on, as in fit.")] = "",
    profiles: Profiles = Path("profiles"),
    strength: Annotated[
        float | None, typer.Option(help="The strength to turn into weights: 1 for a profile, 5 for a method.")
    ] = None,
    bake: Annotated[bool, typer.Option("--bake", help="Fold the shift into the weights as biases, exactly.")] = False,
    goal: Annotated[str, typer.Option(help="With --method: whose default instructions, as a profile's name.")] = "",
    layers: Annotated[str, typer.Option(help="With --method: blocks to read, as in fit; the middle if empty.")] = "",
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="With --method: KEY=VALUE of its first step, as in fit.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Of the LoRA's tuning; the paper's if left out.")] = None,
    batch: Annotated[int | None, typer.Option(help="Responses per step; the paper's if left out.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of AdamW; the paper's if left out.")] = None,
    rank: Annotated[int, typer.Option(help="Of the LoRA; its alpha is twice that.")] = 8,
    targets: Annotated[
        str, typer.Option(help="Its modules, comma-separated, or all-linear; peft's choice if empty.")
    ] = "",
    dtype: Dtype = "auto",
    device: Device = "cpu",
    seed: Seed = 0,
    columns: Columns = "",
    skip_bad_rows: SkipBadRows = False,
    skip_long_rows: SkipLongRows = False,
    as_json: AsJson = False,
) -> None:
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise FitError(f"{out} exists and is not empty: name a new folder")
    if bool(profile) == bool(method):
        raise FitError("name a profile, or give --method")
    if bake == bool(data) or (bake and method):
        raise FitError("give --data to fit a LoRA on its responses, or --bake for a profile, which needs none")
    if not method and (goal or layers or option):
        raise FitError("--goal, --layers and --option belong to --method; a profile has its own")
    source = ModelSource(model, dtype, device)
    if bake:
        path = find_profile(profile, profiles)
        print_made(bake_and_save(path, source, 1.0 if strength is None else strength, out), as_json)
        return
    given = {"steps": steps, "batch": batch, "learning_rate": learning_rate}
    settings = {
        **{key: value for key, value in given.items() if value is not None},
        "rank": rank, "alpha": 2 * rank, "targets": targets, "seed": seed,
    }  # fmt: skip
    rest: dict[str, Any] = {"skip_long_rows": skip_long_rows}
    pairs = load_data(data, columns, skip_bad_rows)
    if method:
        aim: Path | dict[str, Any] = {
            "method": method, "name": goal, "options": parse_options(option or []), "layers": layers,
            **({} if strength is None else {"strength": strength}),
        }  # fmt: skip
    else:
        aim = find_profile(profile, profiles)
        rest["strength"] = 1.0 if strength is None else strength
    print_made(distill_and_save(aim, source, pairs, out, settings, rest, quiet=as_json), as_json)


@reporting_errors
def show_command(
    profile: ProfileNames,
    profiles: Profiles = Path("profiles"),
    html: Annotated[Path | None, typer.Option(help="Draw them in a page here instead.")] = None,
    as_json: AsJson = False,
) -> None:
    show_profiles([find_profile(one, profiles) for one in profile], html, as_json)


def check_suite(context: typer.Context, suite: str) -> None:
    """Raise FitError for an unknown suite, for one without its data, and for options of one that is not run."""
    if suite not in ("preference", "trust", "all"):
        raise FitError(f"--suite {suite!r} is not one of preference, trust, all")
    given = {name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")}
    for other, options in SUITE_OPTIONS.items():
        if suite not in (other, "all") and (unused := sorted(given.intersection(options))):
            names = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
            raise FitError(f"--suite {suite} does not read {names}: leave it out, or ask for --suite {other} or all")
    if suite != "trust" and "data" not in given:
        raise FitError(f"--suite {suite} reads preferences: name them by --data (--suite trust needs none)")


def parse_options(options: list[str]) -> dict[str, str]:
    """Read `KEY=VALUE` as often as it was given. Raises FitError for anything else, and for a key given twice."""
    parsed: dict[str, str] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not key:
            raise FitError(f"--option {option!r} is not KEY=VALUE")
        if key in parsed:
            raise FitError(f"--option {key} is given twice")
        parsed[key] = value
    return parsed


def parse_strengths(text: str) -> tuple[float, ...]:
    """Read `-1,0,1`, ascending. Raises FitError for anything but finite numbers."""
    try:
        strengths = tuple(sorted(float(part) for part in text.split(",")))
    except ValueError:
        strengths = (math.nan,)
    if not all(map(math.isfinite, strengths)):
        raise FitError(f"--strengths {text!r} is not a list of numbers, as in -1,-0.5,0,0.5,1")
    return strengths


def find_profile(profile: str, directory: Path) -> Path:
    """The file that a path or a name means. Raises ProfileError listing the names there are."""
    named = directory / f"{profile}.safetensors"
    for path in (Path(profile), named):
        if path.is_file():
            return path
    names = ", ".join(sorted(path.stem for path in directory.glob("[!.]*.safetensors"))) or "none"
    raise ProfileError(f"there is no profile {profile!r}: neither that file nor {named} exists (there: {names})")
