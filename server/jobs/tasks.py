"""What the jobs of each kind compute: `steering_vectors.fit`, `calibrate` and `evaluate`, and `refine`, on the served
model. Runs in a child process; the server calls the checks of options only."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import steering_vectors
from server.jobs.job import JobResult, JobSettings, ServedModel
from steering_vectors.errors import DataError
from steering_vectors.progress import Progress

if TYPE_CHECKING:
    from server.learning.refine import RefineSettings

OF_DATA = ("columns", "skip_bad_rows")  # options of `load_pairs`
OF_BOUNDS = ("confidence", "min_prompts", "max_kl_ratio", "max_perplexity_ratio", "max_trust_harm")
OF_FITS = ("method", "options", "layers", "tokens", "text_tokens", "text_count", "seed")
OF_REFINEMENTS = (*OF_DATA, "every_vote", "vote_weight", "heldout_fraction", "strength", "canary_share")


def fit_settings(options: Mapping[str, Any]) -> steering_vectors.FitSettings:
    """Raises FitError for options that cannot be used."""
    return steering_vectors.FitSettings(**_of_work(options))


def calibration_settings(options: Mapping[str, Any]) -> steering_vectors.CalibrationSettings:
    """Raises FitError for options that cannot be used."""
    return steering_vectors.CalibrationSettings(**_of_work(options))


def evaluation_settings(options: Mapping[str, Any]) -> steering_vectors.EvaluationSettings:
    """Raises FitError for options that cannot be used."""
    given = _of_work(options)
    if "strengths" in given:
        given["strengths"] = tuple(sorted(given["strengths"]))
    return steering_vectors.EvaluationSettings(**given)


def fit(settings: JobSettings, progress: Progress) -> JobResult:
    """Fit a profile to the job's data."""
    pairs = load_data(settings)
    wanted = fit_settings({**settings.options, "name": settings.profile})
    return stored(steering_vectors.fit(load_served(settings), pairs, wanted, progress=progress), settings)


def calibrate(settings: JobSettings, progress: Progress) -> JobResult:
    """Set the unit and the safe range of a profile again."""
    pairs, profile = load_data(settings), load_base(settings)
    mismatch = {"allow_model_mismatch": settings.allow_model_mismatch}
    wanted = calibration_settings({**settings.options, **mismatch})
    return stored(
        steering_vectors.calibrate(load_served(settings), profile, pairs, wanted, progress=progress), settings
    )


def evaluate(settings: JobSettings, progress: Progress) -> JobResult:
    """Measure a profile on held-out preferences. The figures are what `trimtab evaluate preferences --json` prints."""
    pairs, profile = load_data(settings), load_base(settings)
    wanted = evaluation_settings(settings.options)
    found = steering_vectors.evaluate(load_served(settings), profile, pairs, wanted, progress=progress)
    return JobResult(figures=dict(found))


def check_refinement(options: Mapping[str, Any]) -> None:
    """Raises FitError for options that cannot be used."""
    nothing = Path()
    refine_settings(JobSettings("refined", options, nothing, ServedModel(""), database="sqlite://"))


def refine_settings(settings: JobSettings) -> RefineSettings:
    """Raises FitError for options that cannot be used."""
    from server.learning.feedback_source import FeedbackSource
    from server.learning.promotion import Bounds
    from server.learning.refine import ModelChoice, RefineSettings
    from server.learning.votes import VoteRules
    from server.profiles.candidates import ProfileDirectory
    from steering_vectors.evaluation.trust.suite import TrustSettings

    options = settings.options

    def given(names: Sequence[str]) -> dict[str, Any]:
        return {name: options[name] for name in names if name in options}

    verticals, strength, seed = options.get("trust", ["privacy"]), options.get("strength", 1.0), options.get("seed", 0)
    trust = None
    if verticals:
        rows = options.get("trust_rows", 64)
        trust = TrustSettings(verticals=tuple(verticals), strengths=(0.0, strength or 1.0), rows=rows, seed=seed)
    return RefineSettings(
        name=settings.profile,
        model=ModelChoice(settings.model.model),
        feedback=FeedbackSource(settings.database),
        directory=ProfileDirectory(
            settings.profiles, settings.profile_versions, settings.profile_quota_bytes, settings.audit_log
        ),
        data=settings.data,
        rules=VoteRules(options["max_user_votes"]) if "max_user_votes" in options else VoteRules(),
        fit=steering_vectors.FitSettings(**given(OF_FITS)),
        bounds=Bounds(**given(OF_BOUNDS)),
        trust=trust,
        author=settings.author,
        **given(OF_REFINEMENTS),
    )


def refine(settings: JobSettings, progress: Progress) -> JobResult:
    """Fit a new version to base data and the server's feedback, and stage it in the profile directory if it is better.
    The figures are what `trimtab refine --json` prints."""
    from server.learning.refine import refine as refined

    wanted = refine_settings(settings)
    with contextlib.chdir(settings.folder):  # of the base data
        report = refined(wanted, progress, lm=load_served(settings))
    return JobResult(figures=dict(report))


def load_data(settings: JobSettings) -> steering_vectors.Preferences:
    """The job's data, with its notes in the log. Files of the job are named without their folder, in errors and in the
    profile. Raises DataError."""
    if settings.data is None:
        raise DataError("the job has no data")
    given = {name: settings.options[name] for name in OF_DATA if name in settings.options}
    with contextlib.chdir(settings.folder):
        pairs = steering_vectors.load_pairs(settings.data, **given)
    for note in (*pairs.notes, *(f"skipped: {message}" for message in pairs.skip_messages)):
        print(f"note: {note}", flush=True)
    return pairs


def load_base(settings: JobSettings) -> steering_vectors.Profile:
    """The version of the profile that the job works on. Raises ProfileError."""
    from steering_vectors.profiles.files import read_profile

    assert settings.base is not None
    return read_profile(settings.base.read_bytes(), settings.profile)


def load_served(settings: JobSettings) -> steering_vectors.LanguageModel:
    """The served model, of this process. Raises ModelError."""
    from transformers.utils.logging import disable_progress_bar

    from steering_vectors.models.loading import load_model

    disable_progress_bar()
    given = asdict(settings.model)
    adapter = given.pop("adapter")
    return load_model(**given, adapter=None if adapter is None else Path(adapter))


def stored(profile: steering_vectors.Profile, settings: JobSettings) -> JobResult:
    """The result of a job that made a profile: its file, and what is known of it but its vectors."""
    path = steering_vectors.save_profile(profile, settings.folder)
    return JobResult(dict(steering_vectors.profile_summary(steering_vectors.load_profile(path))), path)


def _of_work(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in OF_DATA}
