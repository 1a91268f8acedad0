"""A profile from a sentence on the demo model: every file is kept, and what does not change is not made again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from steering_vectors.errors import DataError, FitError, ProfileError
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.files import load_profile
from steering_vectors.synthesis.describe import Described, DescribeSettings, Participants, describe
from steering_vectors.synthesis.folder import Folder, Row
from steering_vectors.synthesis.judges import Case, Vote
from steering_vectors.synthesis.writers import Length, LocalWriter

pytestmark = pytest.mark.slow

SENTENCE = "more careful about tea"
SETTINGS = DescribeSettings(
    name="careful-tea",
    instructions=2,
    questions=16,
    samples=3,
    length=Length(tokens=10),
    layers="4",
    text_tokens=0,
    randoms=1,
)


class Rule:
    """A judge by rule, which likes A a little: of two answers the one with more letters e is better."""

    name, biased = "rule", True

    def votes(self, cases: Sequence[Case]) -> Iterator[tuple[Vote, ...]]:
        for case in cases:
            odds = float(case.first.count("e") - case.second.count("e"))
            yield Vote(odds + 0.5), Vote(odds - 0.5, swapped=True)


class Contrary(Rule):
    name = "contrary"

    def votes(self, cases: Sequence[Case]) -> Iterator[tuple[Vote, ...]]:
        for _ in cases:
            yield Vote(2.0), Vote(-2.0, swapped=True)


def made(
    demo: LanguageModel, folder: Path, settings: DescribeSettings = SETTINGS, judge: Rule | None = None
) -> Described:
    participants = Participants(LocalWriter(demo), judge=judge)
    return describe(demo, SENTENCE, folder / "work", folder / "profiles", settings, participants)


@pytest.fixture(scope="module")
def first(demo: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Described]:
    folder = tmp_path_factory.mktemp("described")
    return folder, made(demo, folder, judge=Rule())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "work").iterdir()}


def rows_of(folder: Path, name: str) -> list[Row]:
    return Folder(folder / "work").rows(name)


def test_it_makes_a_calibrated_profile_and_says_what_it_comes_from(first: tuple[Path, Described]) -> None:
    folder, found = first
    assert found.file == folder / "profiles" / "careful-tea.safetensors"
    profile = load_profile(found.file)
    assert profile.description == SENTENCE
    assert "kl_at_1" in profile.calibration
    assert found.pairs["candidates"] == 12 * 2 * 3
    assert found.pairs["kept"] == found.pairs["in_file"] >= 24
    assert found.pairs["kept"] + sum(found.pairs["dropped"].values()) == found.pairs["candidates"]
    assert profile.data["rows"] == found.pairs["kept"]
    assert {path.name for path in (folder / "work").iterdir()} >= {
        "description.json",
        "instructions.jsonl",
        "questions.jsonl",
        "answers.jsonl",
        "verdicts.jsonl",
        "pairs.jsonl",
        "held_out_pairs.jsonl",
        "evaluation_answers.jsonl",
        "evaluation_verdicts.jsonl",
        "evaluation.json",
        "fit.json",
    }
    for row in rows_of(folder, "pairs.jsonl"):
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert chosen.count("e") > rejected.count("e")
        assert row["provenance"]["judge"] == "rule"
        assert row["provenance"]["probability"] >= 0.6


def test_questions_that_are_held_out_are_not_fitted_to(first: tuple[Path, Described]) -> None:
    folder, _ = first
    held = {row["question"] for row in rows_of(folder, "questions.jsonl") if row["held_out"]}
    fitted = {row["prompt"][0]["content"] for row in rows_of(folder, "pairs.jsonl")}
    assert len(held) == 4
    assert not held & fitted
    assert {row["prompt"][0]["content"] for row in rows_of(folder, "held_out_pairs.jsonl")} <= held
    assert {row["question"] for row in rows_of(folder, "evaluation_answers.jsonl")} == held


def test_the_evaluation_has_its_controls(first: tuple[Path, Described]) -> None:
    _, found = first
    assert found.evaluation is not None
    by_voice = {one["voice"]: one for one in found.evaluation["behaviour"]}
    assert list(by_voice) == [
        "unsteered",
        "careful-tea@-1",
        "careful-tea@+1",
        "random-0@-1",
        "random-0@+1",
        "instruction",
        "opposite instruction",
    ]
    assert "preferred" not in by_voice["unsteered"]
    for voice, one in by_voice.items():
        assert one["control"] is voice.startswith("random")
        if "preferred" in one:
            assert 0 <= one["preferred_95"][0] <= one["preferred"] <= one["preferred_95"][1] <= 1
    assert found.judge is not None
    assert found.judge["position_bias"] == {"0": pytest.approx(0.5)}
    assert found.evaluation["preferences"]["prompting"]["positive_instruction"].startswith("You are an assistant")


def test_a_second_run_makes_nothing(demo: LanguageModel, first: tuple[Path, Described]) -> None:
    folder, found = first
    before = contents(folder)
    again = made(demo, folder, judge=Rule())
    assert contents(folder) == before
    assert again.profile.version == found.profile.version
    assert again.evaluation == json.loads(json.dumps(found.evaluation))


def test_edits_are_kept_and_only_what_depends_on_them_is_made_again(
    demo: LanguageModel, first: tuple[Path, Described], tmp_path: Path
) -> None:
    settings = replace(SETTINGS, evaluate=False)
    plain = made(demo, tmp_path, settings)
    assert plain.judge is None
    assert plain.evaluation is None
    assert plain.notes[0] == "no judge read the answers: whether both sides differ is not known"
    folder = Folder(tmp_path / "work")
    answers = folder.rows("answers.jsonl")
    pairs = folder.rows("instructions.jsonl")
    folder.write("instructions.jsonl", [pairs[0], {**pairs[1], "positive": "Drink tea slowly."}])
    changed = made(demo, tmp_path, settings)
    assert folder.rows("answers.jsonl")[: len(answers)] == answers
    assert len(folder.rows("answers.jsonl")) == len(answers) + 16 * 3
    assert changed.profile.version != plain.profile.version
    rows = folder.rows("pairs.jsonl")
    folder.write("pairs.jsonl", rows[:30])
    edited = made(demo, tmp_path, settings)
    assert edited.profile.data["rows"] == 30
    folder.write("instructions.jsonl", pairs[:1])
    with pytest.raises(DataError, match=r"pairs\.jsonl was edited, and what it is made from has changed since"):
        made(demo, tmp_path, settings)


def test_too_few_pairs_are_an_error_that_says_why(demo: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"only 0 of 72 pairs survived \(the judge is not sure: \d+"):
        made(demo, tmp_path, judge=Contrary())
    assert len(rows_of(tmp_path, "verdicts.jsonl")) > 40


def test_a_folder_belongs_to_its_sentence(demo: LanguageModel, first: tuple[Path, Described]) -> None:
    folder, _ = first
    participants = Participants(LocalWriter(demo))
    with pytest.raises(DataError, match=f"holds the work for the sentence '{SENTENCE}'"):
        describe(demo, "more cheerful", folder / "work", folder / "profiles", SETTINGS, participants)


def test_settings_that_cannot_be_used() -> None:
    with pytest.raises(ProfileError, match="'Medical Advice' is not a profile name"):
        DescribeSettings("Medical Advice")
    with pytest.raises(FitError, match="questions must be at least 12, not 3"):
        DescribeSettings("a", questions=3)
    with pytest.raises(FitError, match="method 'magic' is not one of"):
        DescribeSettings("a", method="magic").fit_settings("x")
