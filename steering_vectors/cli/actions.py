"""What each offline command does, once its flags are read.

Owns loading, saving and printing for the commands. Importing it loads no model code; each function imports what it
needs. Knows nothing of flags or exit codes.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steering_vectors.errors import FitError

if TYPE_CHECKING:
    from steering_vectors.models.loading import LanguageModel


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model as the flags name it."""

    model: str
    dtype: str
    device: str

    def load(self) -> LanguageModel:
        from transformers.utils.logging import disable_progress_bar

        from steering_vectors.models.loading import load_model

        disable_progress_bar()
        return load_model(self.model, dtype=self.dtype, device=self.device)


def load_data(data: str, columns: str, skip_bad_rows: bool) -> Any:
    """Preference data from wherever `--data` says."""
    from steering_vectors.data.sources import load_pairs, parse_columns

    renames = parse_columns(columns) if columns else None
    return load_pairs(data, columns=renames, skip_bad_rows=skip_bad_rows)


def fit_and_save(
    source: ModelSource, pairs: Any, out: Path, options: dict[str, Any], gate: str | None, *, quiet: bool
) -> Path:
    """`trimtab fit`: the file that holds the new profile, with a gate if `gate` is a file of labelled prompts."""
    from steering_vectors.fitting.fit import fit
    from steering_vectors.fitting.gates import fit_gate, load_gate_prompts
    from steering_vectors.profiles.files import save_profile
    from steering_vectors.reports.terminal import progress_on_stderr

    prompts = None if gate is None else load_gate_prompts(gate)
    lm = source.load()
    with progress_on_stderr(quiet=quiet) as progress:
        condition = None if prompts is None else fit_gate(lm, prompts, seed=options["seed"], progress=progress)
        profile = fit(lm, None, pairs, progress=progress, **options)
    return save_profile(replace(profile, gate=condition), out)


def recalibrate_and_save(
    path: Path, source: ModelSource, pairs: Any, out: Path, options: dict[str, Any], *, quiet: bool
) -> Path:
    """`trimtab calibrate`: the file that holds the profile."""
    from steering_vectors.fitting.recalibration import recalibrate
    from steering_vectors.profiles.files import load_profile, save_profile
    from steering_vectors.reports.terminal import progress_on_stderr

    profile = load_profile(path)
    lm = source.load()
    with progress_on_stderr(quiet=quiet) as progress:
        return save_profile(recalibrate(lm, profile, pairs, progress=progress, **options), out)


def bake_and_save(path: Path, source: ModelSource, strength: float, out: Path) -> dict[str, Any]:
    """`trimtab distill --bake`: what was written where."""
    from steering_vectors.distillation.baking import bake
    from steering_vectors.profiles.files import load_profile

    profile, lm = load_profile(path), source.load()
    baked = bake(lm, profile, strength)
    try:
        baked.save_pretrained(out)
        lm.tokenizer.save_pretrained(out)
    except OSError as error:
        raise FitError(f"the model cannot be written to {out}: {error}") from error
    return {"model": str(out), "profile": profile.name, "version": profile.version, "strength": strength}


def distill_and_save(
    aim: Path | dict[str, Any],
    source: ModelSource,
    pairs: Any,
    out: Path,
    settings: dict[str, Any],
    rest: dict[str, Any],
    *,
    quiet: bool,
) -> dict[str, Any]:
    """`trimtab distill` of a profile's file, or of a method as `MethodTarget` has it: what was written where, and how
    near it comes."""
    from steering_vectors.distillation.lora import (
        PAPER_SETTINGS,
        DistillSettings,
        MethodTarget,
        distill,
        distill_method,
    )
    from steering_vectors.fitting.layers import parse_layers
    from steering_vectors.profiles.files import load_profile
    from steering_vectors.reports.terminal import progress_on_stderr

    lm = source.load()
    with progress_on_stderr(quiet=quiet) as progress:
        if isinstance(aim, Path):
            profile = load_profile(aim)
            found = distill(lm, profile, pairs, out, settings=DistillSettings(**settings), progress=progress, **rest)
            what = {"profile": profile.name, "version": profile.version}
        else:
            layers = parse_layers(aim["layers"], lm.num_layers) if aim["layers"] else ()
            target = MethodTarget(**{**aim, "layers": layers})
            paper = DistillSettings(**{**PAPER_SETTINGS[target.method], **settings})
            found = distill_method(lm, target, pairs, out, settings=paper, progress=progress, **rest)
            what = {"method": target.method}
    figures = {"distance_before": found.before, "distance_after": found.after, "ratio": found.ratio, "rows": found.rows}
    return {"adapter": str(out), **what, "layers": list(found.layers), **figures}


def evaluate_all(
    files: list[Path],
    source: ModelSource,
    pairs: Any,
    options: dict[str, Any],
    trust: dict[str, Any] | None,
    *,
    quiet: bool,
) -> list[dict[str, Any]]:
    """`trimtab evaluate`: one object per profile, of the suites whose `pairs` or `trust` is given."""
    from steering_vectors.evaluation.preference_suite import EvaluationSettings, evaluate
    from steering_vectors.evaluation.trust.suite import TrustSettings, evaluate_trust, prepare
    from steering_vectors.profiles.files import load_profile
    from steering_vectors.reports.terminal import progress_on_stderr

    settings = EvaluationSettings(**options) if pairs is not None else None
    trust_settings = TrustSettings(**trust) if trust is not None else None
    stored = [load_profile(file) for file in files]
    lm = source.load()
    verticals = prepare(lm, trust_settings) if trust_settings is not None else []
    found = []
    for profile in stored:
        with progress_on_stderr(quiet=quiet) as progress:
            one = evaluate(lm, profile, pairs, settings, progress=progress) if settings is not None else {}
            if trust_settings is not None:
                one |= evaluate_trust(lm, profile, verticals, trust_settings, progress=progress)
        found.append(one)
    return found


def print_made(figures: dict[str, Any], as_json: bool) -> None:
    """What distill made, a line per figure."""
    if as_json:
        print(json.dumps(figures, ensure_ascii=False))
        return
    for key, value in figures.items():
        print(f"{key.replace('_', ' ')}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")


def print_evaluations(found: list[dict[str, Any]], report: Path | None, as_json: bool) -> None:
    """Tables on stdout, or one JSON object; the page, if one is wanted."""
    from steering_vectors.reports.evaluation import render_report
    from steering_vectors.reports.terminal import print_evaluation

    if report is not None:
        _write_text(report, render_report(found))
    if as_json:
        print(json.dumps({"evaluations": found}, ensure_ascii=False))
        return
    for one in found:
        print_evaluation(one)
    if report is not None:
        print(f"report: {report}")


def _write_text(path: Path, text: str) -> None:
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


def print_fitted(path: Path, as_json: bool) -> None:
    """What `fit` and `calibrate` tell of the file they wrote."""
    from steering_vectors.profiles.files import load_profile, profile_summary
    from steering_vectors.reports.terminal import print_fit

    profile = load_profile(path)
    if as_json:
        print(json.dumps({"path": str(path), **profile_summary(profile)}, ensure_ascii=False))
    else:
        print_fit(profile, path)


def show_profiles(paths: list[Path], page: Path | None, as_json: bool) -> None:
    """Everything that files hold: a page if one is wanted, else text; or JSON, a list if they are several."""
    from steering_vectors.profiles.files import load_profile, profile_summary
    from steering_vectors.reports.profiles import render_portraits
    from steering_vectors.reports.terminal import print_profile

    profiles = [load_profile(path) for path in paths]
    if page is not None:
        _write_text(page, render_portraits(profiles))
    if as_json:
        found = [{"path": str(path), **profile_summary(one)} for path, one in zip(paths, profiles, strict=True)]
        print(json.dumps(found if len(found) > 1 else found[0], ensure_ascii=False))
    elif page is not None:
        print(f"page: {page}")
    else:
        for number, (path, profile) in enumerate(zip(paths, profiles, strict=True)):
            if number:
                print()
            print_profile(profile, path)
