"""Flags that several commands share, and what they name. `--help` groups flags by the panels named here."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

import steering_vectors
from steering_vectors.errors import FitError, ProfileError

PANELS = ("Model", "Data", "Method", "Calibration", "Measurement", "Training", "Output", "Profiles")
in_model, in_data, in_method, in_calibration, in_measurement, in_training, in_output, in_profiles = (
    functools.partial(typer.Option, rich_help_panel=panel) for panel in PANELS
)

ProfileName = Annotated[str, typer.Argument(help="A profile file, or the name of a profile in --profiles.")]
ProfileNames = Annotated[list[str], typer.Argument(help="Profile files, or names of profiles in --profiles.")]
Profiles = Annotated[Path, in_profiles(help="The directory of profiles.")]
KlBudget = Annotated[float, in_calibration(help="KL that strength 1 costs, in nats per token.")]
TextTokens = Annotated[
    int, in_calibration(help="The safe range is checked on texts of so many tokens; 0 leaves the check out.")
]
TextCount = Annotated[int, in_calibration(help="Number of these texts at each strength.")]
MethodOptions = Annotated[
    list[str] | None,
    in_method(
        "--option", "-o", help="An option of the method, as KEY=VALUE; can be repeated. `trimtab methods` lists them."
    ),
]
Strengths = Annotated[str, in_measurement(help="Strengths to measure, comma-separated; 0 must be one of them.")]
Report = Annotated[Path | None, in_output(help="Write an HTML page with plots to this file.")]
Seed = Annotated[int, typer.Option(help="The random seed. Equal seeds give equal results.")]
AsJson = Annotated[bool, in_output("--json", help="Print JSON instead of text.")]


@dataclass(frozen=True, slots=True)
class Model:
    model: Annotated[str, in_model(help="`demo`, `smollm2`, a directory, a GGUF file or a Hugging Face model id.")]
    dtype: Annotated[
        str,
        in_model(
            help="auto (the checkpoint's, or float32 on a CPU without bfloat16 products), float32, bfloat16 or float16."
        ),
    ] = "auto"
    device: Annotated[str, in_model(help="The device to run on: cpu, cuda, cuda:1, …")] = "cpu"
    chat_template: Annotated[
        str | None,
        in_model(help="The chat template: the name of one of the tokenizer's, or a Jinja file; by default its own."),
    ] = None
    revision: Annotated[
        str | None, in_model(help="The commit, tag or branch of a hub id; by default its main branch.")
    ] = None

    def load(self) -> steering_vectors.LanguageModel:
        """Load the model without transformers' progress bar."""
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        return steering_vectors.load_model(
            self.model,
            dtype=self.dtype,
            device=self.device,
            chat_template=self.chat_template,
            revision=self.revision,
        )


@dataclass(frozen=True, slots=True)
class Data:
    data: Annotated[
        str, in_data(help="Preference data: a file, `hf:NAME[:split]`, or an embedded set such as `demo:warm`.")
    ]
    columns: Annotated[
        str, in_data(help="Rename columns, as in prompt=question,chosen=matching. `system=` leaves that column out.")
    ] = ""
    skip_bad_rows: Annotated[bool, in_data("--skip-bad-rows", help="Skip unusable rows instead of failing.")] = False
    skip_long_rows: Annotated[
        bool, in_data("--skip-long-rows", help="Skip rows longer than the model's context instead of failing.")
    ] = False

    def load(self) -> steering_vectors.Preferences:
        """Load the data, and print its notes and the first skipped rows on stderr."""
        from steering_vectors.data.sources import parse_columns

        columns = parse_columns(self.columns) if self.columns else None
        pairs = steering_vectors.load_pairs(self.data, columns=columns, skip_bad_rows=self.skip_bad_rows)
        for note in pairs.notes:
            print(f"note: {note}", file=sys.stderr)
        for message in pairs.skip_messages:
            print(f"skipped: {message}", file=sys.stderr)
        return pairs


def parameters_of(group: type[Any]) -> list[inspect.Parameter]:
    """The flags of a group: one for each field of the dataclass."""
    hints = get_type_hints(group, include_extras=True)
    return [one.replace(annotation=hints[one.name]) for one in inspect.signature(group).parameters.values()]


def declare(command: Callable[..., None], flags: Sequence[inspect.Parameter]) -> None:
    """Give a command the signature that typer reads."""
    keywords = [flag.replace(kind=inspect.Parameter.KEYWORD_ONLY) for flag in flags]
    command.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    command.__annotations__ = {flag.name: flag.annotation for flag in flags}


def find_profile(profile: str, directory: Path) -> Path:
    """Return the file of a profile given by path or by name, also a shipped one. Raises ProfileError, with the names
    that exist."""
    from steering_vectors.profiles.shipped import shipped_profiles

    named, shipped = directory / f"{profile}.safetensors", shipped_profiles()
    for path in (Path(profile), named, shipped.get(profile)):
        if path is not None and path.is_file():
            return path
    names = ", ".join(sorted(path.stem for path in directory.glob("[!.]*.safetensors"))) or "none"
    raise ProfileError(f"profile {profile!r} not found: neither that file nor {named} exists (profiles there: {names})")


def load_profiles(names: Sequence[str], directory: Path) -> list[steering_vectors.Profile]:
    """Load profiles given by path or by name, once all of them are found."""
    return [steering_vectors.load_profile(path) for path in [find_profile(name, directory) for name in names]]


def parse_options(options: Sequence[str]) -> dict[str, str]:
    """Read repeated `KEY=VALUE`. Raises FitError for anything else, and for a key given twice."""
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
    """Read `-1,0,1` as ascending numbers. Raises FitError for anything but finite numbers."""
    try:
        strengths = tuple(sorted(float(part) for part in text.split(",")))
    except ValueError:
        strengths = (math.nan,)
    if not all(map(math.isfinite, strengths)):
        raise FitError(f"--strengths {text!r} is not a list of numbers, as in -1,-0.5,0,0.5,1")
    return strengths


def check_empty(folder: Path) -> None:
    """Raise FitError if an output folder exists and is not empty."""
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise FitError(f"--out {folder} exists and is not empty; name a new folder")


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all. Raises FitError if that fails."""
    partial = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise FitError(f"{path} cannot be written: {error.strerror or error}") from error
