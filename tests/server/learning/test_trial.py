"""A trial on live feedback: what counts, what is decided, and what is done about it."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.feedback import adding
from server.feedback.database import Database
from server.feedback.items import Answer, Kind, Stored
from server.learning.feedback_source import FeedbackSource
from server.learning.sequential_test import Outcomes, Seen
from server.learning.trial import TrialSettings, look, seen_in, verdict, watch
from server.profiles.audit import Author
from server.profiles.candidates import Candidates, ProfileDirectory, Trial
from server.profiles.versions import ProfileStore
from steering_vectors.errors import FitError, RequestError
from steering_vectors.profiles.files import save_profile
from steering_vectors.profiles.profile import ModelIdentity
from tests.support.serving import random_profile

MODEL = ModelIdentity("tiny", "Tiny", 8, 4, "f" * 64)
OLD, NEW, SINCE = "a" * 64, "b" * 64, 1000.0
TRIAL = Trial("canary", NEW, OLD, 0.5, SINCE)


def said(
    kind: Kind, value: Any, version: str, *, user: str | None = None, strength: float = 1.0, created: float = SINCE + 1
) -> Stored:
    receipt: Any = {"name": "warm", "version": version, "strength": strength}
    answer: Answer = {"prompt": "p", "text": "t", "created": created, "steering": [receipt]}
    return Stored(0, f"fb-{random.random()}", created, "", "", user, kind, value, None, "", [answer], [None])


def thumb(version: str, up: bool, **more: Any) -> Stored:
    return said("thumb", {"thumb": "up" if up else "down"}, version, **more)


def pair(first: str, second: str, better: str, **more: Any) -> Stored:
    one, other = (thumb(version, True, **more).answers[0] for version in (first, second))
    return replace(said("pair", {"better": better}, first, **more), answers=[one, other], users=[None, None])


def counted(*given: Stored, user_outcomes: int = 1) -> tuple[int, ...]:
    seen = seen_in(given, "warm", TRIAL, user_outcomes)
    return tuple(n for one in (seen.candidate, seen.baseline, seen.pairs) for n in (one.successes, one.failures))


def test_thumbs_and_ratings_of_both_versions_count() -> None:
    rating = {"min": 1, "max": 5}
    found = counted(
        thumb(NEW, True), thumb(NEW, False), thumb(OLD, True),
        said("rating", {**rating, "rating": 5}, NEW), said("rating", {**rating, "rating": 2}, OLD),
    )  # fmt: skip
    assert found == (2, 1, 1, 1, 0, 0)


def test_pairs_of_both_versions_are_won_or_lost() -> None:
    found = counted(
        pair(NEW, OLD, "a"), pair(OLD, NEW, "b"), pair(OLD, NEW, "a"), pair(NEW, OLD, "tie"),
        pair(NEW, NEW, "a"), pair(OLD, "c" * 64, "a"),
    )  # fmt: skip
    assert found == (0, 0, 0, 0, 2, 1)


@pytest.mark.parametrize(
    "one",
    [
        thumb("c" * 64, True),  # another version
        thumb(NEW, True, strength=-1.0),
        thumb(NEW, True, created=SINCE - 1),  # written before the trial
        said("rating", {"min": 1, "max": 5, "rating": 3}, NEW),
        said("signal", {"signal": "copied"}, NEW),
        said("comment", {"comment": "good"}, NEW),
    ],
)
def test_other_feedback_does_not_count(one: Stored) -> None:
    assert counted(one) == (0,) * 6


def test_the_first_outcomes_of_a_user_count() -> None:
    flood = [thumb(NEW, True, user="bot") for _ in range(1000)]
    assert counted(*flood, thumb(OLD, False, user="u")) == (1, 0, 0, 1, 0, 0)
    assert counted(*flood, user_outcomes=3) == (3, 0, 0, 0, 0, 0)
    assert counted(*[thumb(NEW, True)] * 5) == (5, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("candidate", "baseline", "pairs", "expected"),
    [
        ((20, 60), (60, 20), (0, 0), "worse"),
        ((60, 20), (40, 40), (0, 0), "not worse"),
        ((20, 20), (20, 20), (0, 0), "go on"),
        ((50, 50), (50, 50), (0, 0), "undecided"),
        ((0, 0), (0, 0), (8, 30), "worse"),
        ((0, 0), (0, 0), (30, 12), "not worse"),
        ((10, 30), (24, 16), (8, 25), "worse"),  # neither would be enough alone
        ((10, 30), (24, 16), (0, 0), "go on"),
        ((0, 0), (0, 0), (8, 25), "go on"),
    ],
)
def test_what_outcomes_say(
    candidate: tuple[int, int], baseline: tuple[int, int], pairs: tuple[int, int], expected: str
) -> None:
    settings = TrialSettings("warm", FeedbackSource("feedback.db"), max_outcomes=200)
    assert verdict(Seen(Outcomes(*candidate), Outcomes(*baseline), Outcomes(*pairs)), settings) == expected


@pytest.mark.parametrize("values", [{"alpha": 0}, {"margin": 1}, {"holdback": -0.1}, {"max_outcomes": 0}])
def test_settings_that_cannot_be_used(values: dict[str, Any]) -> None:
    with pytest.raises(FitError):
        TrialSettings("warm", FeedbackSource("feedback.db"), **values)


class Served:
    """A profile directory with a candidate, and its feedback database."""

    def __init__(self, folder: Path) -> None:
        self.database = Database(str(folder / "feedback.db"))
        self.database.migrate()
        self.directory = ProfileDirectory(folder / "profiles")
        self.old, self.new = (
            save_profile(random_profile(MODEL, "warm", seed=seed), folder / str(seed)).read_bytes() for seed in (1, 2)
        )
        (folder / "profiles").mkdir()
        (folder / "profiles" / "warm.safetensors").write_bytes(self.old)
        self.versions = {"old": hashlib.sha256(self.old).hexdigest(), "new": hashlib.sha256(self.new).hexdigest()}
        self.candidates.stage("warm", self.new, self.versions["old"], 0.5, Author("me"), "better", {})

    @property
    def store(self) -> ProfileStore:
        return self.directory.store({})

    @property
    def candidates(self) -> Candidates:
        return Candidates(self.store)

    @property
    def file(self) -> bytes:
        return self.store.path("warm").read_bytes()

    def settings(self, **more: Any) -> TrialSettings:
        return TrialSettings("warm", FeedbackSource(self.database.shown), self.directory, **more)

    def say(self, good: int, bad: int, which: str) -> None:
        """Thumbs on answers that were written now, each of another user."""
        with self.database.writing() as connection:
            adding.restore(
                connection,
                [
                    thumb(self.versions[which], number < good, user=f"u{random.random()}", created=time.time())
                    for number in range(good + bad)
                ],
            )


@pytest.fixture
def trial(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path)
    yield made
    made.database.close()


def test_a_good_candidate_is_promoted_and_settled(trial: Served) -> None:
    trial.say(20, 5, "new")
    trial.say(15, 10, "old")
    report = look(trial.settings())
    assert (report["verdict"], report["action"], trial.file) == ("go on", "none", trial.old)
    assert report["candidate"] == {"version": trial.versions["new"], "good": 20, "bad": 5}
    trial.say(60, 10, "new")
    trial.say(30, 40, "old")
    report = look(trial.settings())
    assert (report["phase"], report["verdict"], report["action"]) == ("canary", "not worse", "promoted")
    assert trial.file == trial.new
    report = look(trial.settings())  # what was said before the promotion does not count again
    assert (report["phase"], report["verdict"]) == ("holdback", "go on")
    assert report["candidate"]["good"] == 0
    trial.say(80, 10, "new")
    trial.say(40, 40, "old")
    assert watch(trial.settings(), every=0.01)["action"] == "settled"
    with pytest.raises(RequestError, match="no candidate for profile 'warm' is being tried"):
        look(trial.settings())
    entry = trial.store.audit.read(1, "warm")[0]
    assert entry["reason"].startswith("not worse: 80 of 90 answers are good, 40 of 80 of the other version")


def test_a_bad_candidate_is_withdrawn(trial: Served) -> None:
    trial.say(20, 60, "new")
    trial.say(60, 20, "old")
    report = look(trial.settings())
    assert (report["verdict"], report["action"], trial.file) == ("worse", "withdrawn", trial.old)


def test_a_promoted_version_that_turns_out_worse_is_rolled_back(trial: Served) -> None:
    trial.say(80, 10, "new")
    trial.say(40, 50, "old")
    seen: list[Any] = []
    assert watch(trial.settings(), lambda *told: seen.append(told), every=0.01, seconds=0.0)["action"] == "promoted"
    assert [told[:3] for told in seen] == [("canary of warm", 180, 2000)]
    time.sleep(0.002)
    trial.say(10, 80, "new")
    trial.say(60, 30, "old")
    report = watch(trial.settings(), every=0.01)
    assert (report["phase"], report["verdict"], report["action"]) == ("holdback", "worse", "rolled back")
    assert trial.file == trial.old
    assert [one["action"] for one in trial.store.audit.read(3, "warm")] == ["rollback", "promote", "refine"]


def test_a_trial_without_a_verdict_ends_against_the_candidate(trial: Served) -> None:
    trial.say(10, 10, "new")
    trial.say(10, 10, "old")
    report = look(trial.settings(max_outcomes=40))
    assert (report["verdict"], report["action"], trial.file) == ("undecided", "withdrawn", trial.old)


def test_without_a_holdback_a_promotion_ends_the_trial(trial: Served) -> None:
    trial.say(80, 10, "new")
    trial.say(40, 50, "old")
    assert watch(trial.settings(holdback=0.0), every=0.01)["action"] == "promoted"
    assert trial.candidates.trial("warm") is None
    assert trial.store.record("warm").aliases == {}
