"""What the flags of commands name: models, data, profiles and lists of values."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from steering_vectors.errors import FitError, ProfileError

if TYPE_CHECKING:
    from steering_vectors.data.preferences import Preferences
    from steering_vectors.models.loading import LanguageModel


def load_quietly(model: str, dtype: str, device: str) -> LanguageModel:
    """Load a model without transformers' progress bar."""
    from transformers.utils.logging import disable_progress_bar

    from steering_vectors.models.loading import load_model

    disable_progress_bar()
    return load_model(model, dtype=dtype, device=device)


def load_data(data: str, columns: str, skip_bad_rows: bool) -> Preferences:
    """Load the preference data of `--data`, with `--columns` renamed."""
    from steering_vectors.data.sources import load_pairs, parse_columns

    return load_pairs(data, columns=parse_columns(columns) if columns else None, skip_bad_rows=skip_bad_rows)


def find_profile(profile: str, directory: Path) -> Path:
    """Return the file of a profile given by path or by name. Raises ProfileError, with the names that exist."""
    named = directory / f"{profile}.safetensors"
    for path in (Path(profile), named):
        if path.is_file():
            return path
    names = ", ".join(sorted(path.stem for path in directory.glob("[!.]*.safetensors"))) or "none"
    raise ProfileError(f"profile {profile!r} not found: neither that file nor {named} exists (profiles there: {names})")


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
