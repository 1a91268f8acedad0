"""`trimtab evaluate preferences` and `trimtab evaluate trust`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import steering_vectors
from steering_vectors.cli import flags
from steering_vectors.reports.evaluation import render_report
from steering_vectors.reports.terminal import print_evaluation, progress_on_stderr

VERTICALS = "toxicity,bias,ethics,truthfulness,privacy"


def preferences(
    profile: flags.ProfileNames,
    model: flags.Model,
    data: flags.Data,
    strengths: flags.Strengths = "-1,-0.5,0,0.5,1",
    rows: Annotated[int, flags.in_measurement(min=8, help="The maximum number of held-out rows.")] = 256,
    randoms: Annotated[int, flags.in_measurement(min=0, help="The number of random directions to compare with.")] = 10,
    reward_samples: Annotated[
        int,
        flags.in_measurement(
            min=0, help="Texts per prompt that show the optimum of reward against KL; 0 leaves the reward out."
        ),
    ] = 64,
    seed: flags.Seed = 0,
    profiles: flags.Profiles = Path("profiles"),
    report: flags.Report = None,
    as_json: flags.AsJson = False,
) -> None:
    """Measure margins on held-out preferences, their cost in KL and perplexity, and controls.

    Rows that a profile was trained on are left out.
    """
    stored = flags.load_profiles(profile, profiles)
    settings = steering_vectors.EvaluationSettings(
        flags.parse_strengths(strengths), rows, randoms, reward_samples, seed=seed, skip_long_rows=data.skip_long_rows
    )
    pairs = data.load()
    measure(model.load(), stored, report, as_json, held_out=(pairs, settings))


def trust(
    profile: flags.ProfileNames,
    model: flags.Model,
    data: Annotated[
        Path | None,
        flags.in_data(
            help="The folder with rtp/*.jsonl, crows-pairs/*.csv, ethics/*.csv and truthfulqa/*.json. "
            "The vertical privacy needs none."
        ),
    ] = None,
    verticals: Annotated[str, flags.in_measurement(help="The verticals to measure, comma-separated.")] = VERTICALS,
    toxicity: Annotated[
        str,
        flags.in_measurement(
            help="The toxicity scorer: `rtp` (fitted to that data), a directory with a classifier, or module:callable."
        ),
    ] = "rtp",
    strengths: flags.Strengths = "-1,-0.5,0,0.5,1",
    rows: Annotated[int, flags.in_measurement(min=8, help="The maximum number of rows per vertical.")] = 200,
    randoms: Annotated[int, flags.in_measurement(min=0, help="The number of random directions to compare with.")] = 5,
    seed: flags.Seed = 0,
    profiles: flags.Profiles = Path("profiles"),
    report: flags.Report = None,
    as_json: flags.AsJson = False,
) -> None:
    """Measure toxicity, stereotype bias, machine ethics, truthfulness and privacy, as changes against strength 0."""
    stored = flags.load_profiles(profile, profiles)
    settings = steering_vectors.TrustSettings(
        data, parse_verticals(verticals), flags.parse_strengths(strengths), rows, randoms, toxicity, seed
    )
    measure(model.load(), stored, report, as_json, trust_settings=settings)


def parse_verticals(text: str) -> tuple[str, ...]:
    return tuple(one.strip() for one in text.split(","))


def measure(
    lm: steering_vectors.LanguageModel,
    profiles: Sequence[steering_vectors.Profile],
    report: Path | None,
    as_json: bool,
    *,
    held_out: tuple[steering_vectors.Preferences, steering_vectors.EvaluationSettings] | None = None,
    trust_settings: steering_vectors.TrustSettings | None = None,
) -> None:
    """Run the suites that have settings. Print tables or one JSON object, and write the page if one is asked for."""
    from steering_vectors.evaluation.trust.suite import prepare_verticals

    verticals = [] if trust_settings is None else prepare_verticals(lm, trust_settings)
    found: list[Any] = []
    for profile in profiles:
        one: dict[str, Any] = {}
        with progress_on_stderr(quiet=as_json) as progress:
            if held_out is not None:
                one |= steering_vectors.evaluate(lm, profile, *held_out, progress=progress)
            if trust_settings is not None:
                one |= steering_vectors.evaluate_trust(
                    lm, profile, trust_settings, verticals=verticals, progress=progress
                )
        found.append(one)
    if report is not None:
        flags.write_text(report, render_report(found))
    if as_json:
        print(json.dumps({"evaluations": found}, ensure_ascii=False))
        return
    for evaluation in found:
        print_evaluation(evaluation)
    if report is not None:
        print(f"report: {report}")
