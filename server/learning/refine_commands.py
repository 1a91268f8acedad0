"""`trimtab refine`, `trimtab trial`, `trimtab history` and `trimtab rollback`. They read the feedback database and
change the profile directory themselves; servers of that directory notice within a second."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steering_vectors.cli import flags
from steering_vectors.cli.app import runnable

if TYPE_CHECKING:
    from server.learning.behaviour.weighing import BehaviourReport
    from server.learning.refine import RefineReport
    from server.learning.trial import TrialReport
    from server.profiles.candidates import ProfileDirectory

LEARNING = "Learning from feedback"
SHOWN_DIGITS = 8  # of a version

in_feedback, in_promotion, in_trial, in_directory = (
    functools.partial(typer.Option, rich_help_panel=panel) for panel in ("Feedback", "Promotion", "Trial", "Profiles")
)

Name = Annotated[str, typer.Argument(help="The profile's name.")]
Author = Annotated[str, in_directory(help="Who asks for it, in the audit log.")]


@dataclass(frozen=True, slots=True)
class Directory:
    profiles: Annotated[Path, in_directory(help="The profile directory of the server.", envvar="TRIMTAB_PROFILES")] = (
        Path("profiles")
    )
    profile_versions: Annotated[
        int, in_directory(help="As the server's setting.", envvar="TRIMTAB_PROFILE_VERSIONS", min=0)
    ] = 5
    profile_quota_bytes: Annotated[
        int, in_directory(help="As the server's setting.", envvar="TRIMTAB_PROFILE_QUOTA_BYTES", min=1)
    ] = 2**30
    audit_log: Annotated[Path | None, in_directory(help="As the server's setting.", envvar="TRIMTAB_AUDIT_LOG")] = None

    def choose(self) -> ProfileDirectory:
        from server.profiles.candidates import ProfileDirectory

        return ProfileDirectory(self.profiles, self.profile_versions, self.profile_quota_bytes, self.audit_log)


@dataclass(frozen=True, slots=True)
class Live:
    """How live feedback decides about a candidate."""

    alpha: Annotated[float, in_trial(help="The chance of a wrong verdict in each phase, whenever one looks.")] = 0.05
    margin: Annotated[
        float, in_trial(help="By how much the candidate may be behind, in the rate of good answers and in pairs.")
    ] = 0.1
    max_outcomes: Annotated[
        int, in_trial(help="The outcomes after which a candidate without a verdict is withdrawn.", min=1)
    ] = 2000
    user_outcomes: Annotated[int, in_trial(help="How many outcomes of one user count.", min=1)] = 1
    holdback: Annotated[
        float, in_trial(help="The share of requests that keep the version before, after a promotion; 0 for none.")
    ] = 0.1
    every: Annotated[float, in_trial(help="Seconds between two looks of --watch.", min=0.1)] = 10.0


def refine(
    name: Name,
    model: flags.Model,
    directory: Directory,
    live: Live,
    feedback_database: Annotated[
        str,
        in_feedback(help="The feedback database: a file, or a postgresql:// URL.", envvar="TRIMTAB_FEEDBACK_DATABASE"),
    ] = "",
    feedback_file: Annotated[
        Path | None, in_feedback(help="A file of `trimtab feedback export`, or of TRL's rows, instead.")
    ] = None,
    every_vote: Annotated[
        bool, in_feedback("--every-vote", help="Take votes on other profiles' answers as well.")
    ] = False,
    max_user_votes: Annotated[
        float, in_feedback(help="All votes of one user together count at most as so many.")
    ] = 200.0,
    signals: Annotated[
        bool,
        in_feedback("--signals", help="Make votes of signals as well, and weigh users by how reliable they are."),
    ] = False,
    signal_prior: Annotated[
        float, in_feedback(help="As how many explicit judgements the prior likelihood of each signal counts.")
    ] = 8.0,
    max_user_share: Annotated[
        float, in_feedback(help="With --signals: the share of all votes that one user's may weigh together.")
    ] = 0.1,
    discriminator: Annotated[
        bool,
        in_feedback(help="With --signals: doubt users whose behaviour does not depend on what they read."),
    ] = True,
    vote_weight: Annotated[
        float,
        in_feedback(
            help="How much a vote counts in the fit, compared with a base row; 0 lets all votes together count three "
            "times as much as all base rows. Methods without weights need 1.",
        ),
    ] = 0.0,
    data: Annotated[
        str, flags.in_data(help="The base data: a file, `hf:NAME[:split]`, or `demo:NAME`. Without it, votes alone.")
    ] = "",
    columns: Annotated[str, flags.in_data(help="Rename columns, as in prompt=question,chosen=matching.")] = "",
    skip_bad_rows: Annotated[
        bool, flags.in_data("--skip-bad-rows", help="Skip unusable base rows instead of failing.")
    ] = False,
    heldout_fraction: Annotated[
        float, flags.in_data(help="Share of the prompts that is in no fit, by their hashes.")
    ] = 0.4,
    method: Annotated[str, flags.in_method(help="The method. See `trimtab methods`.")] = "mean-diff",
    option: flags.MethodOptions = None,
    layers: Annotated[str, flags.in_method(help="auto, 12, 10-20 (both ends included) or 3,5,7.")] = "auto",
    text_tokens: flags.TextTokens = 160,
    text_count: flags.TextCount = 16,
    confidence: Annotated[float, in_promotion(help="Of the interval of the gain, which must lie above 0.")] = 0.95,
    min_prompts: Annotated[int, in_promotion(help="Held-out prompts with votes that are needed.", min=2)] = 8,
    max_kl_ratio: Annotated[float, in_promotion(help="KL per token, as a factor of the served version's.")] = 1.25,
    max_perplexity_ratio: Annotated[
        float, in_promotion(help="Perplexity of steered texts, as a factor of the served version's.")
    ] = 1.25,
    max_trust_harm: Annotated[
        float, in_promotion(help="By how much the main figure of a trust vertical may become worse.")
    ] = 0.05,
    trust: Annotated[
        str, in_promotion(help="Verticals of the trust suite, comma-separated; an empty text for none.")
    ] = "privacy",
    trust_data: Annotated[
        Path | None, in_promotion(help="The folder of `trimtab evaluate trust --data`; privacy needs none.")
    ] = None,
    trust_rows: Annotated[int, in_promotion(help="The maximum number of rows per vertical.", min=8)] = 64,
    strength: Annotated[float, in_promotion(help="The strength at which both versions are compared.")] = 1.0,
    canary_share: Annotated[
        float, in_promotion(help="The share of requests for the candidate; 0 promotes it at once.")
    ] = 0.1,
    watch: Annotated[bool, in_trial("--watch", help="Look at live feedback until the trial ends.")] = False,
    seed: flags.Seed = 0,
    author: Author = "trimtab refine",
    as_json: flags.AsJson = False,
) -> None:
    """Fit a new version of a profile to base data and feedback, and try it as a canary if it is better.

    Better means: the chosen answers of held-out votes become more likely than under the served version, by more than
    chance, while KL, perplexity and trust stay within bounds. What came of it is in `trimtab history`.
    """
    from server.learning.behaviour.weighing import SignalSettings
    from server.learning.feedback_source import FeedbackSource
    from server.learning.promotion import Bounds
    from server.learning.refine import ModelChoice, RefineSettings
    from server.learning.refine import refine as run
    from server.learning.votes import VoteRules
    from server.profiles.audit import Author as AuthorOfChange
    from steering_vectors.data.sources import parse_columns
    from steering_vectors.evaluation.trust.suite import TrustSettings
    from steering_vectors.fitting.fit import FitSettings
    from steering_vectors.reports.terminal import progress_on_stderr

    verticals = tuple(one.strip() for one in trust.split(",") if one.strip())
    settings = RefineSettings(
        name=name,
        model=ModelChoice(model.model, model.dtype, model.device, model.chat_template, model.revision),
        feedback=FeedbackSource(feedback_database or None, feedback_file),
        directory=directory.choose(),
        data=data or None,
        columns=parse_columns(columns) if columns else None,
        skip_bad_rows=skip_bad_rows,
        every_vote=every_vote,
        rules=VoteRules(max_user_votes),
        signals=SignalSettings(signal_prior, max_user_share, discriminator) if signals else None,
        vote_weight=vote_weight,
        heldout_fraction=heldout_fraction,
        fit=FitSettings(
            method=method,
            options=flags.parse_options(option or []),
            layers=layers,
            text_tokens=text_tokens,
            text_count=text_count,
            seed=seed,
        ),
        strength=strength,
        bounds=Bounds(confidence, min_prompts, max_kl_ratio, max_perplexity_ratio, max_trust_harm),
        trust=TrustSettings(trust_data, verticals, (0.0, strength), trust_rows, seed=seed) if verticals else None,
        canary_share=canary_share,
        author=AuthorOfChange(author),
    )
    with progress_on_stderr(quiet=as_json) as progress:
        report = run(settings, progress)
    _print(report, as_json, *_lines(report))
    if watch and report["outcome"] == "canary":
        _watch(name, feedback_database, directory, live, author, as_json)


def trial(
    name: Name,
    directory: Directory,
    live: Live,
    feedback_database: Annotated[
        str,
        in_feedback(help="The feedback database: a file, or a postgresql:// URL.", envvar="TRIMTAB_FEEDBACK_DATABASE"),
    ],
    watch: Annotated[bool, in_trial("--watch", help="Look again and again, until the trial ends.")] = False,
    author: Author = "trimtab trial",
    as_json: flags.AsJson = False,
) -> None:
    """Look at the live feedback on a candidate: promote it, withdraw it or roll it back, or wait for more feedback."""
    if watch:
        _watch(name, feedback_database, directory, live, author, as_json)
        return
    from server.learning.trial import look

    report = look(_trial_settings(name, feedback_database, directory, live, author))
    _print(report, as_json, *_trial_lines(report))


def history(
    name: Name,
    directory: Directory,
    limit: Annotated[int, typer.Option(help="The maximum number of changes.", min=1, max=1000)] = 100,
    as_json: flags.AsJson = False,
) -> None:
    """Show what was done to a profile and why, the newest change first: fits, trials, promotions, rollbacks."""
    from server.profiles.versions import checked_name
    from steering_vectors.profiles.shipped import shipped_profiles

    changes = directory.choose().store(shipped_profiles()).audit.read(limit, checked_name(name))
    _print({"profile": name, "changes": changes}, as_json, *map(_change, changes))


def rollback(
    name: Name,
    directory: Directory,
    version: Annotated[
        str, typer.Argument(help="The version, at least 8 digits; by default the one before the candidate.")
    ] = "",
    reason: Annotated[str, typer.Option(help="Why, for the history.")] = "by hand",
    author: Author = "trimtab rollback",
    as_json: flags.AsJson = False,
) -> None:
    """Serve an earlier version of a profile again, with exactly its bytes, and end every trial of it."""
    from server.profiles.audit import Author as AuthorOfChange
    from server.profiles.candidates import Candidates
    from steering_vectors.profiles.shipped import shipped_profiles

    candidates = Candidates(directory.choose().store(shipped_profiles()))
    change = candidates.rollback(name, version or None, AuthorOfChange(author), reason)
    answer = {"profile": name, "from_version": change.before, "to_version": change.after}
    _print(answer, as_json, f"{name}: {_short(change.before)} -> {_short(change.after)}")


def register_learning(app: typer.Typer) -> None:
    """Add the commands to a typer app."""
    commands: tuple[Callable[..., None], ...] = (refine, trial, history, rollback)
    for command in commands:
        app.command(rich_help_panel=LEARNING)(runnable(command))


def _watch(name: str, database: str, directory: Directory, live: Live, author: str, as_json: bool) -> None:
    from server.learning.trial import watch
    from steering_vectors.reports.terminal import progress_on_stderr

    settings = _trial_settings(name, database, directory, live, author)
    with progress_on_stderr(quiet=as_json) as progress:
        report = watch(settings, progress, every=live.every)
    _print(report, as_json, *_trial_lines(report))


def _trial_settings(name: str, database: str, directory: Directory, live: Live, author: str) -> Any:
    from server.learning.feedback_source import FeedbackSource
    from server.learning.trial import TrialSettings

    return TrialSettings(
        name,
        FeedbackSource(database or None),
        directory.choose(),
        live.alpha,
        live.margin,
        live.max_outcomes,
        live.user_outcomes,
        live.holdback,
        author,
    )


def _lines(report: RefineReport) -> list[str]:
    votes, gain = report["votes"], report["gain"]
    lines = [
        f"votes: {votes['fitted']} fitted, {votes['held_out']} held out on {votes['held_out_prompts']} prompts",
        *(f"left out {count}: {reason}" for reason, count in votes["left_out"].items()),
        f"held-out votes won over the served version: {0.5 + gain['value']:.1%} "
        f"({0.5 + gain['low']:.1%} to {0.5 + gain['high']:.1%}), {report['gain_nats']['value']:+.2f} nats",
    ]
    if "base_gain" in report:
        base = report["base_gain"]
        lines.append(f"on held-out base rows: {base['value']:+.3f} nats ({base['low']:+.3f} to {base['high']:+.3f})")
    if "behaviour" in report:
        lines += _behaviour_lines(report["behaviour"])
    for gate in report["gates"]:
        mark = "passed" if gate["holds"] else "FAILED"
        lines.append(f"{mark}: {gate['name']} {gate['value']:.4g}, {gate['rule']} {gate['bound']:.4g}")
    done = {
        "rejected": "it is not promoted",
        "canary": f"it gets {report['share']:.0%} of the requests, until `trimtab trial` decides",
        "promoted": "it is served",
    }
    name = report["candidate"]
    return [*lines, f"{report['profile']}: candidate {_short(name)}: {done[report['outcome']]}"]


def _behaviour_lines(found: BehaviourReport) -> list[str]:
    said = ", ".join(f"{name} {value:+.2f} ± {error:.2f}" for name, (value, error) in found["log_odds"].items())
    lines = [
        f"signals: {found['signal_votes']} votes of {found['behaviours']} behaviours; log-odds, from "
        f"{found['judgements']} judgements and the prior: {said}",
        f"users: {found['users']}, of whom {found['doubted']} count less than half",
    ]
    if (fits := found["calibration"]) is not None:
        lines.append(
            f"judgements foretold by signals: Brier score {fits['brier']:.3f} (a coin: {fits['chance']}), expected "
            f"calibration error {fits['expected_error']:.3f}"
        )
    return lines


def _trial_lines(report: TrialReport) -> list[str]:
    low, high = report["difference"]
    sides = [
        f"{side} {_short(rates['version'])}: {rates['good']} good, {rates['bad']} bad"
        for side, rates in (("candidate", report["candidate"]), ("baseline", report["baseline"]))
    ]
    pairs = report["pairs"]
    sides.append(f"pairs of both: {pairs['wins']} won, {pairs['losses']} lost")
    what = "" if report["action"] == "none" else f"; {report['action']}"
    return [*sides, f"difference of the rates: {low:+.3f} to {high:+.3f}: {report['verdict']}{what}"]


def _change(entry: Mapping[str, Any]) -> str:
    versions = f"{_short(entry.get('from_version'))} -> {_short(entry.get('to_version'))}"
    who = entry.get("key") or entry.get("address") or "the directory"
    alias = [entry["alias"]] if "alias" in entry else []
    reason = [entry["reason"]] if "reason" in entry else []
    return "  ".join([entry["at"], who, entry["action"], *alias, versions, *reason])


def _short(version: str | None) -> str:
    return version[:SHOWN_DIGITS] if version else "none"


def _print(answer: object, as_json: bool, *lines: str) -> None:
    for line in [json.dumps(answer, ensure_ascii=False)] if as_json else lines:
        print(line)
