"""Amplifying on the demo model with a rule: rounds, their record, going on after an interruption, and when it stops."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.quality.manners import score
from server.cli import app
from server.learning import amplify as amplifying
from server.learning import comparison
from server.learning.amplify import AmplifyReport, AmplifySettings, amplify, prompts_of, stop_reason
from server.learning.feedback_source import FeedbackSource
from server.learning.held_out import is_held_out, prompt_key
from server.learning.refine import ModelChoice, RefineSettings
from server.profiles.audit import Author
from server.profiles.candidates import Candidates, ProfileDirectory
from server.profiles.versions import ProfileStore
from steering_vectors.data.sources import DEMO_DIRECTORY, load_pairs
from steering_vectors.errors import DataError, FitError
from steering_vectors.fitting.fit import FitSettings, fit
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.files import save_profile
from steering_vectors.synthesis.folder import Folder
from steering_vectors.synthesis.judges import PersonJudge
from steering_vectors.synthesis.rule_judges import RuleJudge, parse_rule
from steering_vectors.synthesis.writers import Length
from tests.support.few_texts import few_texts

pytestmark = pytest.mark.slow

FITTING = FitSettings(name="warm", layers="4", text_tokens=0)
COLD = f"{__name__}:cold"
PROMPTS = prompts_of(load_pairs("demo:concise").positives)[:80]


def cold(prompt: str, answer: str) -> float:
    return -score("warm", answer)


@dataclass(frozen=True, slots=True)
class Place:
    """A profile directory with one profile, and the folder of an amplification."""

    folder: Path

    @property
    def store(self) -> ProfileStore:
        return ProfileDirectory(self.folder / "profiles").store({})

    @property
    def served(self) -> bytes:
        return self.store.path("warm").read_bytes()

    def settings(self, **more: Any) -> AmplifySettings:
        refining = RefineSettings(
            "warm", ModelChoice("demo"), FeedbackSource(file=self.folder / "unused"),
            ProfileDirectory(self.folder / "profiles"), fit=FITTING, trust=None,
        )  # fmt: skip
        given = {"rounds": 1, "pairs": 64, "length": Length(40), "test_answers": 1, **more}
        return AmplifySettings(refining, self.folder / "work", PROMPTS, **given)

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "work" / name).read_text(encoding="utf-8").splitlines()]


@dataclass(frozen=True, slots=True)
class Done:
    place: Place
    first: bytes
    report: AmplifyReport
    bars: list[tuple[str, int, int, str]]


@pytest.fixture(scope="module", autouse=True)
def _few_texts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        few_texts(patch)
        patch.setattr(comparison, "TEXTS", 8)
        yield


@pytest.fixture(scope="module")
def first(demo: LanguageModel, tmp_path_factory: pytest.TempPathFactory, _few_texts: None) -> Path:
    """A directory with a version that was fitted to warm answers."""
    folder = tmp_path_factory.mktemp("first")
    rows = (DEMO_DIRECTORY / "warm.train.jsonl").read_text(encoding="utf-8").splitlines()[:48]
    (folder / "base.jsonl").write_text("\n".join(rows), encoding="utf-8")
    save_profile(fit(demo, load_pairs(folder / "base.jsonl"), FITTING), folder)
    return folder / "warm.safetensors"


def place_in(folder: Path, first: Path) -> Place:
    (folder / "profiles").mkdir()
    shutil.copy(first, folder / "profiles")
    return Place(folder)


@pytest.fixture(scope="module")
def done(demo: LanguageModel, first: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A round with a rule that likes cold answers, from a version that writes warm ones."""
    place, bars = place_in(tmp_path_factory.mktemp("done"), first), []
    report = amplify(
        place.settings(),
        parse_rule(COLD),
        lambda stage, now, total, detail="": bars.append((stage, now, total, detail)),
        lm=demo,
    )
    return Done(place, first.read_bytes(), report, bars)


def test_rounds_promote_versions_that_the_rule_prefers(done: Done) -> None:
    start, first = done.report["rounds"]
    assert (start["outcome"], start["win"]["value"], start["version"]) == (
        "first", 0.5, hashlib.sha256(done.first).hexdigest(),
    )  # fmt: skip
    assert first["outcome"] == "promoted"
    assert first["win"]["value"] > 0.5
    assert first["gain"] is not None
    assert first["gain"]["low"] > 0
    assert all(gate["holds"] for gate in first["gates"])
    assert first["budget"] == pytest.approx(0.12)
    assert first["votes"] >= 40
    assert hashlib.sha256(done.place.served).hexdigest() == first["version"]
    assert done.report["stopped"] == "all rounds are done"
    assert done.report["best"] == 1
    assert {bar[:1] + bar[2:3] for bar in done.bars} == {("rounds", 1)}
    assert any(bar[3].startswith("round 1: judge ") for bar in done.bars)


def test_the_folder_records_everything(done: Done) -> None:
    place, settings = done.place, done.place.settings()
    assert place.lines("rounds.jsonl") == done.report["rounds"]
    assert (place.folder / "work" / "first.safetensors").read_bytes() == done.first
    kinds = {
        (row["round"], row["kind"], row["side"], row["strength"])
        for row in place.lines("answers.jsonl")
        if "kind" in row
    }
    assert {(1, "near", 0, 1.0), (1, "near", 1, 1.0)} <= kinds
    far = {side: strength for number, kind, side, strength in kinds if (number, kind) == (1, "far")}
    assert far[0] > 1
    assert far[1] < -1
    tests = {row["prompt"] for row in place.lines("answers.jsonl") if "test" in row}
    voted = {row["prompt"][0]["content"] for row in place.lines("votes.jsonl")}
    assert tests == {prompt[0].content for prompt in PROMPTS if settings.is_test(prompt)}
    assert not tests & voted
    assert all(is_held_out(prompt_key(text), 0.4) for text in tests)
    for row in place.lines("votes.jsonl"):
        chosen, rejected = (row[side][0]["content"] for side in ("chosen", "rejected"))
        assert score("warm", chosen) < score("warm", rejected)


def test_a_round_that_was_cut_off_is_taken_over(done: Done, demo: LanguageModel, tmp_path: Path) -> None:
    """It was killed after the refinement, while the round was written down."""
    shutil.copytree(done.place.folder, tmp_path, dirs_exist_ok=True)
    place = Place(tmp_path)
    rounds = tmp_path / "work" / "rounds.jsonl"
    lines = rounds.read_text(encoding="utf-8").splitlines(keepends=True)
    rounds.write_text(lines[0] + lines[1][:40], encoding="utf-8")
    answers, bytes_before = place.lines("answers.jsonl"), place.served
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(amplifying, "refine")  # it is not refined again
        again = amplify(place.settings(), parse_rule(COLD), lm=demo)
    volatile = ("seconds", "cpu_seconds")
    for new, old in zip(again["rounds"], done.report["rounds"], strict=True):
        assert {**new, **dict.fromkeys(volatile)} == {**old, **dict.fromkeys(volatile)}
    assert (place.lines("answers.jsonl"), place.served) == (answers, bytes_before)


def test_a_candidate_that_was_only_staged_is_promoted(done: Done, demo: LanguageModel, tmp_path: Path) -> None:
    shutil.copytree(done.place.folder, tmp_path, dirs_exist_ok=True)
    place, (start, wanted) = Place(tmp_path), done.report["rounds"]
    data = place.store.read("warm", wanted["version"])
    shutil.rmtree(tmp_path / "profiles")
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "warm.safetensors").write_bytes(done.first)
    rounds = tmp_path / "work" / "rounds.jsonl"
    rounds.write_text(rounds.read_text(encoding="utf-8").splitlines(keepends=True)[0], encoding="utf-8")
    author = Author(f"trimtab amplify {start['run']}/1")
    figures = {"gain": wanted["gain"], "gates": wanted["gates"]}
    Candidates(place.store).stage("warm", data, start["version"], 0.0, author, wanted["reason"], figures)
    report = amplify(place.settings(), parse_rule(COLD), lm=demo)
    assert report["rounds"][1]["win"] == wanted["win"]
    assert report["rounds"][1]["outcome"] == "promoted"
    assert place.served == data
    assert Candidates(place.store).trial("warm") is None


def test_a_finished_run_answers_at_once_and_other_work_is_refused(
    done: Done, demo: LanguageModel, tmp_path: Path
) -> None:
    shutil.copytree(done.place.folder, tmp_path, dirs_exist_ok=True)
    place = Place(tmp_path)
    assert amplify(place.settings(), parse_rule(COLD), lm=demo)["rounds"] == done.report["rounds"]
    with pytest.raises(DataError, match=r"by the judge rule .*:cold: name another folder"):
        amplify(place.settings(), parse_rule("length:long"), lm=demo)
    (tmp_path / "profiles" / "warm.safetensors").write_bytes(done.first)
    with pytest.raises(DataError, match="was changed since round 1"):
        amplify(place.settings(rounds=2), parse_rule(COLD), lm=demo)


def test_a_rule_by_chance_promotes_nothing(demo: LanguageModel, first: Path, tmp_path: Path) -> None:
    place = place_in(tmp_path, first)
    judge = RuleJudge("coin", lambda prompt, answer: random.Random(f"3{prompt}{answer}").random())
    report = amplify(place.settings(), judge, lm=demo)
    assert [row["outcome"] for row in report["rounds"]] == ["first", "rejected"]
    assert "the gain on held-out votes" in report["rounds"][1]["reason"]
    assert place.served == first.read_bytes()
    assert Candidates(place.store).trial("warm") is None


def test_people_judge_by_a_file(demo: LanguageModel, first: Path, tmp_path: Path) -> None:
    place = place_in(tmp_path, first)
    judge = PersonJudge(Folder(tmp_path / "work"))
    with pytest.raises(DataError, match="comparisons have no answer yet"):
        amplify(place.settings(pairs=4), judge, lm=demo)
    assert {"prompt", "a", "b", "better"} <= place.lines("ballots.jsonl")[0].keys()
    assert place.served == first.read_bytes()


def row(outcome: str, win: float, kl: float = 0.1, budget: float = 0.1, number: int = 1) -> Any:
    return {"outcome": outcome, "win": {"value": win}, "kl": kl, "budget": budget, "round": number}


START = row("first", 0.5, number=0)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([START], ""),
        ([START, row("promoted", 0.6)], ""),
        ([START, row("rejected", 0.5), row("promoted", 0.6, number=2)], ""),
        ([START, row("rejected", 0.5), row("rejected", 0.5, number=2)], "no gain in 2 rounds"),
        ([START, row("promoted", 0.7), row("promoted", 0.6), row("rejected", 0.6)], "no gain in 2 rounds"),
        ([START, row("promoted", 0.7, kl=0.2)], "the KL budget is spent"),
        ([START, row("promoted", 0.7, budget=0.2)], "the KL budget is spent"),
        ([START, row("rejected", 0.5, budget=0.2)], ""),
        ([START, row("promoted", 0.6, number=9)], "all rounds are done"),
    ],
)
def test_when_it_stops(rows: list[Any], reason: str) -> None:
    assert stop_reason(rows, 9, 2, 0.2) == reason


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rounds": 0}, "must be at least 1"),
        ({"kl_growth": 0.9}, "kl_growth must be at least 1"),
        ({"far": (1.0, 1.0)}, "far strengths must differ"),
        ({"kl_budget": -1.0}, "kl_budget"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(FitError, match=message):
        Place(tmp_path).settings(**given)
    with pytest.raises(FitError, match=r"8 are needed: give about 80 prompts"):
        replace(Place(tmp_path).settings(), prompts=PROMPTS[:9])


def test_the_command_prints_and_draws_what_the_folder_holds(done: Done, tmp_path: Path) -> None:
    shutil.copytree(done.place.folder, tmp_path, dirs_exist_ok=True)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(prompt[0].content for prompt in PROMPTS), encoding="utf-8")
    words = [
        "amplify", "warm", "--model", "demo", "--profiles", str(tmp_path / "profiles"), "--prompts", str(prompts),
        "--folder", str(tmp_path / "work"), "--rounds", "1",
    ]  # fmt: skip
    picture = tmp_path / "curve.svg"
    found = CliRunner().invoke(app, [*words, "--rule", COLD, "--plot", str(picture), "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["rounds"] == done.report["rounds"]
    assert "<svg" in picture.read_text(encoding="utf-8")
    shown = CliRunner().invoke(app, [*words, "--rule", COLD]).stdout
    assert "round 1: promoted, win rate " in shown
    assert "stopped: all rounds are done" in shown
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code != 0
    assert "too few to judge answers: give a --rule" in refused.stderr
