"""Refining on the demo model: votes make a candidate, gates decide, and nothing that is held out is ever fitted on."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from server.cli import app
from server.engines.errors import Conflict
from server.feedback import adding
from server.feedback.database import Database
from server.feedback.items import Item, Subject, Submission, Who
from server.learning import refine as refining
from server.learning.feedback_source import FeedbackSource
from server.learning.held_out import is_held_out, pair_key
from server.learning.promotion import Bounds
from server.learning.refine import ModelChoice, RefineSettings, refine
from server.profiles.audit import Author
from server.profiles.candidates import Candidates, ProfileDirectory
from steering_vectors.data.preferences import Preferences
from steering_vectors.data.sources import DEMO_DIRECTORY, load_pairs
from steering_vectors.errors import DataError, FitError
from steering_vectors.fitting.fit import FitSettings, fit
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.files import read_profile, save_profile
from tests.support.few_texts import few_texts

pytestmark = pytest.mark.slow

FITTING = FitSettings(name="warm", layers="4", text_tokens=0)
LAYER = ("--layers", "4", "--text-tokens", "0", "--trust", "")
ROWS = 48  # of base data


@pytest.fixture(autouse=True)
def _few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    few_texts(monkeypatch)


def rows_of(manner: str, count: int) -> list[dict[str, Any]]:
    lines = (DEMO_DIRECTORY / f"{manner}.train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


@dataclass(frozen=True, slots=True)
class Place:
    """A profile directory, its base data and an empty feedback database."""

    folder: Path
    first: bytes

    @property
    def url(self) -> str:
        return str(self.folder / "feedback.db")

    @property
    def directory(self) -> ProfileDirectory:
        return ProfileDirectory(self.folder / "profiles")

    def settings(self, **more: Any) -> RefineSettings:
        made = RefineSettings(
            "warm", ModelChoice("demo"), FeedbackSource(self.url), self.directory,
            data=str(self.folder / "base.jsonl"), fit=FITTING, trust=None, every_vote=True,
        )  # fmt: skip
        return replace(made, **more)

    def vote(self, rows: Sequence[dict[str, Any]], better: Sequence[str], user: str = "u") -> None:
        """Pairs of texts, in which the chosen one is `a`."""
        items = [
            Item("pair", {"better": side}, _sides(row), row["prompt"], user)
            for row, side in zip(rows, better, strict=True)
        ]
        database = Database(self.url)
        database.migrate()
        with database.writing() as connection:
            adding.add(connection, [Submission(tuple(items), Who(), 100.0)])
        database.close()

    @property
    def history(self) -> list[dict[str, Any]]:
        return self.directory.store({}).audit.read(100, "warm")


def _sides(row: dict[str, Any]) -> tuple[Subject, Subject]:
    return Subject("a", text=row["chosen"][0]["content"]), Subject("b", text=row["rejected"][0]["content"])


@pytest.fixture(scope="module")
def first(demo: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a version that was fitted to the base data."""
    folder = tmp_path_factory.mktemp("first")
    (folder / "base.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of("warm", ROWS)))
    with pytest.MonkeyPatch.context() as patch:
        few_texts(patch)
        made = fit(demo, load_pairs(folder / "base.jsonl"), FITTING)
    return save_profile(made, folder).read_bytes()


@pytest.fixture
def place(tmp_path: Path, first: bytes) -> Place:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "warm.safetensors").write_bytes(first)
    (tmp_path / "base.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of("warm", ROWS)))
    return Place(tmp_path, first)


class Spy:
    """Fits, and remembers what it was given."""

    def __init__(self) -> None:
        self.given: list[Preferences] = []

    def __call__(self, lm: Any, pairs: Preferences, settings: Any, **more: Any) -> Any:
        self.given.append(pairs)
        return fit(lm, pairs, settings, **more)


def test_votes_that_agree_make_a_better_version(
    place: Place, demo: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """110 votes for honest replies, on a profile that was fitted to warm ones. Later votes are a second round."""
    spy = Spy()
    monkeypatch.setattr(refining, "fit", spy)
    rows = rows_of("honest", 160)
    place.vote(rows[:110], ["a"] * 110)
    stages: set[str] = set()
    report = refine(place.settings(), lambda stage, done, total, detail="": stages.add(stage), lm=demo)
    assert (report["outcome"], report["reason"]) == ("canary", "every gate was passed")
    assert report["gain"]["low"] > 0
    assert all(gate["holds"] for gate in report["gates"])
    assert {"capture", "calibrate", "compare"} <= stages
    counts = report["votes"]
    assert (counts["fitted"] + counts["held_out"], counts["held_out_prompts"]) == (110, counts["held_out"])
    store = place.directory.store({})
    version = report["candidate"]
    assert version is not None
    candidate = read_profile(store.read("warm", version), "warm")
    assert candidate.data["refined_from"] == hashlib.sha256(place.first).hexdigest() == report["baseline"]
    assert candidate.data["feedback_rows"] == counts["fitted"]
    assert store.path("warm").read_bytes() == place.first
    trial = Candidates(store).trial("warm")
    assert trial is not None
    assert (trial.candidate, trial.share) == (version, 0.1)
    (entry,) = place.history
    assert (entry["action"], entry["to_version"], entry["figures"]["gain"]) == ("refine", version, report["gain"])

    with pytest.raises(Conflict, match="is being tried"):
        refine(place.settings(), lm=demo)
    Candidates(store).rollback("warm", None, Author("me"), "again")
    place.vote(rows[110:], ["a"] * 50)
    again = refine(place.settings(canary_share=0.0), lm=demo)
    assert again["outcome"] == "promoted"
    assert again["votes"]["fitted"] + again["votes"]["held_out"] == 160
    seen = {pair_key(*pair) for pairs in spy.given for pair in pairs.pairs()}
    assert len(spy.given) == 2
    assert not [key for key in seen if is_held_out(key, 0.4)]
    assert len(seen) > 100
    first, second = spy.given
    assert first.weighted
    votes = first.weights[-report["votes"]["fitted"] :]
    assert sum(votes) == pytest.approx(3 * (first.rows - len(votes)))  # base rows weigh 1
    assert second.rows > first.rows
    Candidates(store).rollback("warm", None, Author("me"), "by hand")
    assert store.path("warm").read_bytes() == place.first
    assert [one["action"] for one in reversed(place.history)] == ["refine", "withdraw", "refine", "promote", "rollback"]


def test_votes_that_contradict_each_other_are_rejected(place: Place, demo: LanguageModel) -> None:
    """Whatever the candidate is, it wins as much as it loses. How often chance passes the gate is tested in
    `test_paired_bootstrap`."""
    for better in "ab":
        place.vote(rows_of("honest", 60), [better] * 60, user=f"who prefers {better}")
    report = refine(place.settings(), lm=demo)
    assert report["gain"]["value"] == pytest.approx(0, abs=1e-6)
    assert (report["outcome"], report["candidate"]) == ("rejected", None)
    assert "the low end of the gain on held-out votes is " in report["reason"]
    store = place.directory.store({})
    assert store.path("warm").read_bytes() == place.first
    assert Candidates(store).trial("warm") is None
    (entry,) = place.history
    assert (entry["action"], entry["from_version"], entry["to_version"]) == (
        "refine",
        report["baseline"],
        report["baseline"],
    )
    assert entry["reason"] == report["reason"]


def test_a_candidate_that_costs_too_much_is_rejected(place: Place, demo: LanguageModel) -> None:
    place.vote(rows_of("honest", 120), ["a"] * 120)
    report = refine(place.settings(bounds=Bounds(max_kl_ratio=0.5)), lm=demo)
    assert report["outcome"] == "rejected"
    assert report["reason"].startswith("KL per token is ")
    assert report["gain"]["low"] > 0


def test_too_few_votes_are_named(place: Place, demo: LanguageModel) -> None:
    place.vote(rows_of("honest", 12), ["a"] * 11 + ["tie"])
    with pytest.raises(FitError, match=r"8 held-out ones are needed, so gather about 20 prompts.*1: a tie"):
        refine(place.settings(), lm=demo)
    assert place.history == []


def test_a_method_without_weights_needs_votes_that_count_as_rows(place: Place, demo: LanguageModel) -> None:
    place.vote(rows_of("honest", 60), ["a"] * 60)
    with pytest.raises(FitError, match="bipo cannot use the weights of rows"):
        refine(place.settings(fit=replace(FITTING, method="bipo")), lm=demo)


def test_what_was_held_out_once_stays_so(place: Place, demo: LanguageModel, first: bytes) -> None:
    """A served version that held out more than the settings would is refused."""
    stored = read_profile(first, "warm")
    save_profile(replace(stored, data={**stored.data, "heldout_prompts": 0.5}), place.folder / "profiles")
    with pytest.raises(FitError, match=r"holds out 0\.5 of all prompts: hold out as many, or more"):
        refine(place.settings(), lm=demo)


def test_settings_can_be_sent_to_another_process(place: Place) -> None:
    assert pickle.loads(pickle.dumps(place.settings())) == place.settings()


def test_base_data_with_labels_is_refused(place: Place, demo: LanguageModel) -> None:
    rows = [{"prompt": f"q {n}", "completion": f"text {n}", "label": n % 2 == 0} for n in range(32)]
    (place.folder / "base.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="refining needs base data of pairs"):
        refine(place.settings(), lm=demo)


@pytest.mark.parametrize(
    "values", [{"heldout_fraction": 0.0}, {"canary_share": 1.0}, {"vote_weight": -1.0}, {"strength": 0.0}]
)
def test_settings_that_cannot_be_used(place: Place, values: dict[str, Any]) -> None:
    with pytest.raises(FitError):
        place.settings(**values)


def run(*words: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_commands(place: Place) -> None:
    """From an export, without base data: a candidate, a look at its trial, the history, and the way back."""
    place.vote(rows_of("honest", 120), ["a"] * 120)
    export = str(place.folder / "pairs.jsonl")
    profiles = ("--profiles", str(place.folder / "profiles"))
    run("feedback", "export", "--feedback-database", place.url, "--out", export)
    report = run(
        "refine", "warm", "--model", "demo", "--feedback-file", export, "--canary-share", "0.2", *LAYER, *profiles
    )
    assert (report["outcome"], report["base_rows"], report["share"]) == ("canary", 0, 0.2)
    look = run("trial", "warm", "--feedback-database", place.url, *profiles)
    assert (look["verdict"], look["candidate"]["version"]) == ("go on", report["candidate"])
    assert run("rollback", "warm", "--reason", "enough", *profiles)["to_version"] == report["baseline"]
    changes = run("history", "warm", *profiles)["changes"]
    assert [(one["action"], one["key"]) for one in changes] == [
        ("withdraw", "trimtab rollback"),
        ("refine", "trimtab refine"),
    ]
    shown = CliRunner().invoke(app, ["history", "warm", *profiles], catch_exceptions=False).stdout
    old, new = report["baseline"][:8], report["candidate"][:8]
    assert f"trimtab rollback  withdraw  canary  {new} -> {old}  enough" in shown
    failed = CliRunner().invoke(app, ["trial", "warm", "--feedback-database", place.url, *profiles])
    assert failed.exit_code == 2
    assert "no candidate for profile 'warm' is being tried" in failed.stderr
