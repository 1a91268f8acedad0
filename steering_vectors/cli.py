"""The offline commands, `fit` and `show`, for the root command `trimtab` to mount.

Owns flags, exit codes and what goes to which stream: progress and messages to stderr, the answer to stdout. Importing
it loads no model code, so that help answers at once; each command imports what it needs. Knows nothing of how
anything is computed.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer

from steering_vectors.errors import FitError, ProfileError, TrimtabError

FAILED = 2
METHODS_HELP = "mean-diff, pca, probe, contrast-prompts, bipo, rahf-scit or rahf-dual."

P = ParamSpec("P")


def register(app: typer.Typer) -> None:
    """Add the commands `fit` and `show` to a typer app."""
    app.command("fit", help="Fit a profile to preference data and store it.")(fit_command)
    app.command("show", help="Print everything a profile holds.")(show_command)


def reporting_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Turn an error raised on purpose into one line on stderr and exit code 2."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except TrimtabError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(FAILED) from error

    return run


@reporting_errors
def fit_command(
    name: Annotated[str, typer.Argument(help="The profile's name: it is stored as NAME.safetensors.")],
    model: Annotated[str, typer.Option(help="`demo`, a directory, or a hub id.")],
    data: Annotated[str, typer.Option(help="Preference data: a file, `hf:NAME[:split]`, or `demo:warm` and its like.")],
    method: Annotated[str, typer.Option(help=METHODS_HELP)] = "mean-diff",
    layers: Annotated[str, typer.Option(help="auto, 12, 10-20 (both ends included) or 3,5,7.")] = "auto",
    tokens: Annotated[str, typer.Option(help="Read the mean over the `response`, or its `last` token.")] = "response",
    out: Annotated[Path, typer.Option(help="Where profiles are kept.")] = Path("profiles"),
    layering: Annotated[str, typer.Option(help="independent or incremental.")] = "independent",
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    kl_budget: Annotated[float, typer.Option(help="Nats of KL per token that strength 1 costs.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal profiles.")] = 0,
    heldout_fraction: Annotated[float, typer.Option(help="Share of the rows that is not trained on.")] = 0.2,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens per forward pass.")] = 4096,
    columns: Annotated[str, typer.Option(help="Rename columns: prompt=question,chosen=matching.")] = "",
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="Leave out unusable rows.")] = False,
    skip_long_rows: Annotated[
        bool, typer.Option("--skip-long-rows", help="Leave out rows longer than the model's context.")
    ] = False,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="An option of the method, KEY=VALUE; may be repeated.")
    ] = None,
    description: Annotated[str, typer.Option(help="A sentence to store with it.")] = "",
    no_calibrate: Annotated[bool, typer.Option("--no-calibrate", help="Leave the unit at 1.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    options = {
        "name": name, "method": method, "layers": layers, "tokens": tokens, "layering": layering, "seed": seed,
        "kl_budget": kl_budget, "heldout_fraction": heldout_fraction, "batch_tokens": batch_tokens,
        "skip_long_rows": skip_long_rows, "description": description, "calibrate": not no_calibrate,
        "options": parse_options(option or []),
    }  # fmt: skip
    pairs = _load_data(data, columns, skip_bad_rows)
    path = _fit_and_save(model, dtype, device, pairs, out, options, quiet=as_json)
    _print_profile(path, as_json, fitted=True)


@reporting_errors
def show_command(
    profile: Annotated[str, typer.Argument(help="A profile's file, or its name in --profiles.")],
    profiles: Annotated[Path, typer.Option(help="Where profiles are kept.")] = Path("profiles"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    _print_profile(find_profile(profile, profiles), as_json, fitted=False)


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


def find_profile(profile: str, directory: Path) -> Path:
    """The file that a path or a name means. Raises ProfileError listing the names there are."""
    named = directory / f"{profile}.safetensors"
    for path in (Path(profile), named):
        if path.is_file():
            return path
    names = ", ".join(sorted(path.stem for path in directory.glob("[!.]*.safetensors"))) or "none"
    raise ProfileError(f"there is no profile {profile!r}: neither that file nor {named} exists (there: {names})")


def _load_data(data: str, columns: str, skip_bad_rows: bool) -> Any:
    from steering_vectors.datasets import load_pairs, parse_columns

    renames = parse_columns(columns) if columns else None
    return load_pairs(data, columns=renames, skip_bad_rows=skip_bad_rows)


def _fit_and_save(
    model: str, dtype: str, device: str, pairs: Any, out: Path, options: dict[str, Any], *, quiet: bool
) -> Path:
    from transformers.utils.logging import disable_progress_bar

    from steering_vectors.display import progress_on_stderr
    from steering_vectors.fitting import fit
    from steering_vectors.models import load_model
    from steering_vectors.storage import save_profile

    disable_progress_bar()
    lm = load_model(model, dtype=dtype, device=device)
    with progress_on_stderr(quiet=quiet) as progress:
        profile = fit(lm, None, pairs, progress=progress, **options)
    return save_profile(profile, out)


def _print_profile(path: Path, as_json: bool, *, fitted: bool) -> None:
    from steering_vectors.display import print_fit, print_profile
    from steering_vectors.storage import load_profile, profile_summary

    profile = load_profile(path)
    if as_json:
        print(json.dumps({"path": str(path), **profile_summary(profile)}, ensure_ascii=False))
    elif fitted:
        print_fit(profile, path)
    else:
        print_profile(profile, path)
