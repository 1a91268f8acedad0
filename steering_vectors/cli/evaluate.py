"""`trimtab evaluate preferences` and `trimtab evaluate trust`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steering_vectors.cli.flags import (
    DATA,
    MEASUREMENT,
    AsJson,
    Columns,
    Device,
    Dtype,
    Model,
    Pairs,
    ProfileNames,
    Profiles,
    Report,
    Seed,
    SkipBadRows,
    SkipLongRows,
    Strengths,
)
from steering_vectors.cli.inputs import find_profile, load_data, load_quietly, parse_strengths, write_text

if TYPE_CHECKING:
    from steering_vectors.data.preferences import Preferences
    from steering_vectors.evaluation.preference_suite import EvaluationSettings
    from steering_vectors.evaluation.trust.suite import TrustSettings
    from steering_vectors.measures.results import Evaluation, PreferenceEvaluation, TrustEvaluation
    from steering_vectors.models.loading import LanguageModel
    from steering_vectors.profiles.profile import Profile

VERTICALS = "toxicity,bias,ethics,truthfulness,privacy"


def preferences(
    profile: ProfileNames,
    model: Model,
    data: Pairs,
    strengths: Strengths = "-1,-0.5,0,0.5,1",
    rows: Annotated[
        int, typer.Option(min=8, help="The maximum number of held-out rows.", rich_help_panel=MEASUREMENT)
    ] = 256,
    randoms: Annotated[
        int, typer.Option(min=0, help="The number of random directions to compare with.", rich_help_panel=MEASUREMENT)
    ] = 10,
    reward_samples: Annotated[
        int,
        typer.Option(
            min=0,
            help="Texts per prompt that show the optimum of reward against KL; 0 leaves the reward out.",
            rich_help_panel=MEASUREMENT,
        ),
    ] = 64,
    columns: Columns = "",
    skip_bad_rows: SkipBadRows = False,
    skip_long_rows: SkipLongRows = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    seed: Seed = 0,
    profiles: Profiles = Path("profiles"),
    report: Report = None,
    as_json: AsJson = False,
) -> None:
    """Measure margins on held-out preferences, their cost in KL and perplexity, and controls.

    Rows that a profile was trained on are left out.
    """
    from steering_vectors.evaluation.preference_suite import EvaluationSettings

    stored = load_profiles(profile, profiles)
    settings = EvaluationSettings(
        parse_strengths(strengths), rows, randoms, reward_samples, seed=seed, skip_long_rows=skip_long_rows
    )
    pairs = load_data(data, columns, skip_bad_rows)
    lm = load_quietly(model, dtype, device)
    print_evaluations(measure_preferences(lm, stored, pairs, settings, quiet=as_json), report, as_json)


def trust(
    profile: ProfileNames,
    model: Model,
    data: Annotated[
        Path | None,
        typer.Option(
            help="The folder with rtp/*.jsonl, crows-pairs/*.csv, ethics/*.csv and truthfulqa/*.json. "
            "The vertical privacy needs none.",
            rich_help_panel=DATA,
        ),
    ] = None,
    verticals: Annotated[
        str, typer.Option(help="The verticals to measure, comma-separated.", rich_help_panel=MEASUREMENT)
    ] = VERTICALS,
    toxicity: Annotated[
        str,
        typer.Option(
            help="The toxicity scorer: `rtp` (fitted to that data), a directory with a classifier, or module:callable.",
            rich_help_panel=MEASUREMENT,
        ),
    ] = "rtp",
    strengths: Strengths = "-1,-0.5,0,0.5,1",
    rows: Annotated[
        int, typer.Option(min=8, help="The maximum number of rows per vertical.", rich_help_panel=MEASUREMENT)
    ] = 200,
    randoms: Annotated[
        int, typer.Option(min=0, help="The number of random directions to compare with.", rich_help_panel=MEASUREMENT)
    ] = 5,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    seed: Seed = 0,
    profiles: Profiles = Path("profiles"),
    report: Report = None,
    as_json: AsJson = False,
) -> None:
    """Measure toxicity, stereotype bias, machine ethics, truthfulness and privacy, as changes against strength 0."""
    from steering_vectors.evaluation.trust.suite import TrustSettings

    stored = load_profiles(profile, profiles)
    settings = TrustSettings(
        data, parse_verticals(verticals), parse_strengths(strengths), rows, randoms, toxicity, seed
    )
    lm = load_quietly(model, dtype, device)
    print_evaluations(measure_trust(lm, stored, settings, quiet=as_json), report, as_json)


def parse_verticals(text: str) -> tuple[str, ...]:
    return tuple(one.strip() for one in text.split(","))


def load_profiles(names: Sequence[str], directory: Path) -> list[Profile]:
    from steering_vectors.profiles.files import load_profile

    return [load_profile(path) for path in [find_profile(name, directory) for name in names]]


def measure_preferences(
    lm: LanguageModel, profiles: Sequence[Profile], pairs: Preferences, settings: EvaluationSettings, *, quiet: bool
) -> list[PreferenceEvaluation]:
    from steering_vectors.evaluation.preference_suite import evaluate
    from steering_vectors.reports.terminal import progress_on_stderr

    found = []
    for profile in profiles:
        with progress_on_stderr(quiet=quiet) as progress:
            found.append(evaluate(lm, profile, pairs, settings, progress=progress))
    return found


def measure_trust(
    lm: LanguageModel, profiles: Sequence[Profile], settings: TrustSettings, *, quiet: bool
) -> list[TrustEvaluation]:
    from steering_vectors.evaluation.trust.suite import evaluate_trust, prepare_verticals
    from steering_vectors.reports.terminal import progress_on_stderr

    verticals, found = prepare_verticals(lm, settings), []
    for profile in profiles:
        with progress_on_stderr(quiet=quiet) as progress:
            found.append(evaluate_trust(lm, profile, settings, verticals=verticals, progress=progress))
    return found


def print_evaluations(found: Sequence[Evaluation], report: Path | None, as_json: bool) -> None:
    """Print tables or one JSON object, and write the page if one is asked for."""
    from steering_vectors.reports.evaluation import render_report
    from steering_vectors.reports.terminal import print_evaluation

    if report is not None:
        write_text(report, render_report(found))
    if as_json:
        print(json.dumps({"evaluations": found}, ensure_ascii=False))
        return
    for one in found:
        print_evaluation(one)
    if report is not None:
        print(f"report: {report}")
