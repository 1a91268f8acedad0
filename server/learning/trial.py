"""A trial on live feedback: the candidate and the version before it share the requests, and a sequential test decides.

Everything follows from the aliases of the profile directory and from the feedback database, so a look can be repeated,
and goes on where one that was killed has ended.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from typing_extensions import TypedDict

from server.feedback.items import Answer, Stored
from server.learning.feedback_source import FeedbackSource
from server.learning.sequential_test import (
    Outcomes,
    Seen,
    difference_interval,
    log_evidence_against_at_least,
    log_evidence_against_at_most,
)
from server.profiles.audit import Author
from server.profiles.candidates import Candidates, Phase, ProfileDirectory, Trial
from steering_vectors.errors import FitError, RequestError
from steering_vectors.profiles.shipped import shipped_profiles
from steering_vectors.progress import Progress

Verdict = Literal["go on", "worse", "not worse", "undecided"]
PAIRS = "pairs"
Action = Literal["none", "promoted", "withdrawn", "rolled back", "settled"]


@dataclass(frozen=True, slots=True)
class TrialSettings:
    """Options of a trial.

    - `alpha`: the chance of a wrong verdict "worse", and of a wrong verdict "not worse", in each phase.
    - `margin`: by how much the candidate may be behind: its rate of good answers against the other version's, and its
      wins less its losses as a share of pairs.
    - `max_outcomes`: the number of outcomes after which a trial without a verdict ends, against the candidate.
    - `user_outcomes`: how many outcomes of one user count, the first ones. What one user says is not independent, and
      the guarantee is about independent outcomes. Outcomes without a user all count.
    - `holdback`: the share of the requests that still get the version before after a promotion, so that a promoted
      version that turns out worse is rolled back; 0 ends the trial with the promotion.

    Raises FitError for values that cannot be used.
    """

    name: str
    feedback: FeedbackSource
    directory: ProfileDirectory = field(default_factory=ProfileDirectory)
    alpha: float = 0.05
    margin: float = 0.1
    max_outcomes: int = 2000
    user_outcomes: int = 1
    holdback: float = 0.1
    author: str = "trimtab trial"

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise FitError(f"alpha must be between 0 and 1, not {self.alpha:g}")
        if not 0 <= self.margin < 1 or not 0 <= self.holdback < 1:
            raise FitError("margin and holdback must be at least 0 and below 1")
        if min(self.max_outcomes, self.user_outcomes) < 1:
            raise FitError("max_outcomes and user_outcomes must be at least 1")


class Rates(TypedDict):
    """The outcomes of a version."""

    version: str
    good: int
    bad: int


class Pairs(TypedDict):
    """Pairs of an answer of either version."""

    wins: int
    losses: int


class TrialReport(TypedDict):
    """One look at a trial. `difference` is the interval of the rates of good answers at 1 − alpha, candidate less
    baseline; `action` says what was done."""

    profile: str
    phase: Phase
    candidate: Rates
    baseline: Rates
    pairs: Pairs
    difference: tuple[float, float]
    verdict: Verdict
    action: Action


def look(settings: TrialSettings) -> TrialReport:
    """Look at the live feedback of a trial once, and do what it says: promote the candidate, withdraw it, roll it back
    after a promotion, end the trial, or nothing. May be called at any time, and any number of times.

    Raises RequestError if no trial runs, and what the profile store and the feedback database raise.
    """
    candidates = Candidates(settings.directory.store(shipped_profiles()))
    trial = candidates.trial(settings.name)
    if trial is None:
        raise RequestError(
            f"no candidate for profile {settings.name!r} is being tried: make one with `trimtab refine`",
            code="no_trial",
        )
    stored = settings.feedback.since(settings.name, trial.since)
    seen = seen_in(stored, settings.name, trial, settings.user_outcomes)
    new, old, pairs = seen.candidate, seen.baseline, seen.pairs
    found = verdict(seen, settings)
    report: TrialReport = {
        "profile": settings.name,
        "phase": trial.phase,
        "candidate": {"version": trial.candidate, "good": new.successes, "bad": new.failures},
        "baseline": {"version": trial.baseline, "good": old.successes, "bad": old.failures},
        "pairs": {"wins": pairs.successes, "losses": pairs.failures},
        "difference": difference_interval(new, old, settings.alpha),
        "verdict": found,
        "action": "none",
    }
    if found != "go on":
        report["action"] = _act(candidates, trial, report, settings)
    return report


def watch(
    settings: TrialSettings,
    progress: Progress | None = None,
    *,
    every: float = 10.0,
    seconds: float = float("inf"),
) -> TrialReport:
    """Look at a trial every few seconds until it ends, or until so many seconds have passed. Returns the last look.
    Raises what `look` raises."""
    last = time.monotonic() + seconds
    while True:
        report = look(settings)
        if progress is not None:
            sides = (report["candidate"], report["baseline"])
            count = sum(side["good"] + side["bad"] for side in sides) + sum(_both(report["pairs"]))
            low, high = report["difference"]
            detail = f"difference {low:+.2f} to {high:+.2f}"
            progress(f"{report['phase']} of {settings.name}", count, max(count, settings.max_outcomes), detail)
        ended = report["action"] not in ("none", "promoted") or (
            report["action"] == "promoted" and not settings.holdback
        )
        if ended or time.monotonic() + every > last:
            return report
        time.sleep(every)


def verdict(seen: Seen, settings: TrialSettings) -> Verdict:
    """What the outcomes say by now."""
    enough = math.log(1 / settings.alpha)
    if log_evidence_against_at_least(seen, 0.0) >= enough:
        return "worse"
    if log_evidence_against_at_most(seen, -settings.margin) >= enough:
        return "not worse"
    return "undecided" if seen.count >= settings.max_outcomes else "go on"


def seen_in(stored: Iterable[Stored], name: str, trial: Trial, user_outcomes: int) -> Seen:
    """What feedback says about answers that were written during a trial at a positive strength: thumbs and ratings on
    either version's, and pairs of both. Ratings count by the half of their scale; ties and the middle do not."""
    counts: Counter[tuple[str, bool]] = Counter()
    users: Counter[str] = Counter()
    for one in stored:
        outcome = _outcome(one, name, trial)
        if outcome is None:
            continue
        if one.user is not None:
            users[one.user] += 1
            if users[one.user] > user_outcomes:
                continue
        counts[outcome] += 1
    return Seen(*(Outcomes(counts[of, True], counts[of, False]) for of in (trial.candidate, trial.baseline, PAIRS)))


def _outcome(one: Stored, name: str, trial: Trial) -> tuple[str, bool] | None:
    """What a piece of feedback is about, a version or the pairs, and whether it is a success."""
    versions = [_version(answer, name, trial) for answer in one.answers]
    if one.kind == "pair":
        if set(versions) != {trial.candidate, trial.baseline} or one.value["better"] == "tie":
            return None
        return PAIRS, versions[0 if one.value["better"] == "a" else 1] == trial.candidate
    good = is_good(one)
    return None if good is None or versions[0] is None else (versions[0], good)


def _both(pairs: Pairs) -> tuple[int, int]:
    return pairs["wins"], pairs["losses"]


def is_good(one: Stored) -> bool | None:
    """Whether a thumb or a rating says that an answer is good; None for other feedback and the middle of a scale."""
    if one.kind == "thumb":
        return bool(one.value["thumb"] == "up")
    if one.kind != "rating":
        return None
    middle = (one.value["min"] + one.value["max"]) / 2
    return None if one.value["rating"] == middle else bool(one.value["rating"] > middle)


def _version(answer: Answer, name: str, trial: Trial) -> str | None:
    """The version of the trial that wrote an answer."""
    if answer.get("created", 0.0) < trial.since:
        return None
    for receipt in answer.get("steering", ()):
        if receipt["name"] == name and receipt["strength"] > 0:
            return receipt["version"] if receipt["version"] in (trial.candidate, trial.baseline) else None
    return None


def _act(candidates: Candidates, trial: Trial, report: TrialReport, settings: TrialSettings) -> Action:
    new, old, (wins, losses) = report["candidate"], report["baseline"], _both(report["pairs"])
    reason = (
        f"{report['verdict']}: {new['good']} of {new['good'] + new['bad']} answers are good, {old['good']} of "
        f"{old['good'] + old['bad']} of the other version, and {wins} of {wins + losses} pairs are won"
    )
    figures = {one: report[one] for one in ("candidate", "baseline", "pairs", "difference")}
    name, author = settings.name, Author(settings.author)
    if trial.phase == "canary":
        if report["verdict"] == "not worse":
            candidates.promote(name, trial, settings.holdback, author, reason, figures)
            return "promoted"
        candidates.withdraw(name, trial, author, reason, figures)
        return "withdrawn"
    if report["verdict"] == "worse":
        candidates.rollback(name, None, author, reason, figures)
        return "rolled back"
    candidates.settle(name, trial, author, reason, figures)
    return "settled"
