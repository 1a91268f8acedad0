"""Debates on the demo model: opposed profiles answer and argue, and the verdicts that hold become pairs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from steering_vectors.data.chat import Message
from steering_vectors.data.sources import load_pairs
from steering_vectors.errors import DataError, FitError
from steering_vectors.models.loading import LanguageModel
from steering_vectors.synthesis.debate import Debated, DebateSettings, debate, read_prompts, shown
from steering_vectors.synthesis.folder import Folder
from steering_vectors.synthesis.judges import Case, ModelJudge, Rule, Vote
from steering_vectors.synthesis.writers import Length, LocalWriter, Voice
from tests.support.serving import random_profile

PROMPTS = [(Message("user", f"How do I make {thing}?"),) for thing in ("tea", "bread", "a knot", "coffee")] * 6
PROMPTS = [(Message("user", f"{one[0].content} {number}"),) for number, one in enumerate(PROMPTS)]
SETTINGS = DebateSettings(
    Voice("Be kind.", "one@0.5"),
    Voice("Be rude.", "one@-0.5"),
    length=Length(12, 1.5),
    rebuttal=Length(6, 1.5),
    rounds=2,
)


class Longest:
    """A judge by rule: the side that has said more characters is better."""

    name, biased = "longest", True

    def __init__(self) -> None:
        self.cases: list[Case] = []

    def votes(self, cases: Sequence[Case]) -> Iterator[tuple[Vote, ...]]:
        for case in cases:
            self.cases.append(case)
            first, second = (
                len(answer) + sum(len(one[side]) for one in case.exchange)
                for side, answer in enumerate((case.first, case.second))
            )
            yield Vote(float(first - second) + 1), Vote(float(first - second) - 1, swapped=True)


@pytest.fixture(scope="module")
def writer(demo: LanguageModel) -> LocalWriter:
    return LocalWriter(demo, {"one": random_profile(demo.identity, "one", unit=1.0)})


@pytest.fixture(scope="module")
def first(writer: LocalWriter, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Debated, Longest]:
    folder, judge = tmp_path_factory.mktemp("debate"), Longest()
    return folder, debate(PROMPTS, folder, SETTINGS, writer, judge), judge


def test_the_winner_is_chosen_and_the_pair_says_why(first: tuple[Path, Debated, Longest]) -> None:
    folder, found, judge = first
    rows = Folder(folder).rows("pairs.jsonl")
    assert found.pairs == len(rows) == sum(found.figures["outcomes"].get(one, 0) for one in ("first", "second"))
    by_key = {case.key: case for case in judge.cases}
    for row in rows:
        provenance = row["provenance"]
        case = by_key[provenance["case"]]
        won = provenance["chosen_side"]["steering"] == "one@0.5"
        assert row["chosen"][0]["content"] == (case.first if won else case.second)
        assert row["rejected"][0]["content"] == (case.second if won else case.first)
        assert (provenance["judge"], provenance["rounds"], provenance["consistent"]) == ("longest", 2, True)
        assert len(case.exchange) == 2
    assert found.figures["position_bias"] == {"0": pytest.approx(1.0)}
    assert load_pairs(folder / "pairs.jsonl").rows == len(rows)


def test_a_run_goes_on_and_rounds_share_the_answers(first: tuple[Path, Debated, Longest], writer: LocalWriter) -> None:
    folder, found, judge = first
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    again = debate(PROMPTS, folder, SETTINGS, writer, judge)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert again.decisions == found.decisions
    alone = debate(PROMPTS, folder, replace(SETTINGS, rounds=0), writer, judge)
    assert (folder / "answers.jsonl").read_bytes() == before["answers.jsonl"]
    assert (folder / "rebuttals.jsonl").read_bytes() == before["rebuttals.jsonl"]
    assert alone.decisions != found.decisions
    debate(PROMPTS, folder, SETTINGS, writer, judge)


def test_sides_speak_to_each_other(first: tuple[Path, Debated, Longest]) -> None:
    folder, _, judge = first
    rows = Folder(folder).rows("rebuttals.jsonl")
    case = judge.cases[0]
    said = {(row["round"], row["side"]): row["text"] for row in rows if row["prompt"] == case.prompt}
    assert case.exchange == tuple((said[number, "first"], said[number, "second"]) for number in (1, 2))


def test_the_model_judges_too(demo: LanguageModel, writer: LocalWriter, tmp_path: Path) -> None:
    settings = replace(SETTINGS, rounds=1, rule=Rule(0.5))
    found = debate(PROMPTS[:6], tmp_path, settings, writer, ModelJudge(demo))
    assert 0 < found.pairs <= 6
    assert 0 <= found.figures["mass"] <= 1


def test_no_sure_verdict_is_an_error(writer: LocalWriter, tmp_path: Path) -> None:
    class Torn(Longest):
        def votes(self, cases: Sequence[Case]) -> Iterator[tuple[Vote, ...]]:
            yield from ((Vote(1.0), Vote(-1.0, swapped=True)) for _ in cases)

    with pytest.raises(DataError, match=r"no verdict on 3 prompts counts \(unsure: 3\)"):
        debate(PROMPTS[:3], tmp_path, replace(SETTINGS, rounds=0), writer, Torn())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"second": SETTINGS.first}, "both sides are the same"),
        ({"rounds": 6}, "rounds must be from 0 to 5, not 6"),
        ({"question": " "}, "the judge's question is empty"),
    ],
)
def test_settings_that_cannot_be_used(change: dict[str, object], message: str) -> None:
    with pytest.raises(FitError, match=message):
        replace(SETTINGS, **change)  # type: ignore[arg-type]


def test_prompts_are_read_once_from_texts_and_tables(tmp_path: Path) -> None:
    text = tmp_path / "prompts.txt"
    text.write_text("Hello\n\n  Why? \nHello\n")
    assert [shown(one) for one in read_prompts(str(text))] == ["Hello", "Why?"]
    table = tmp_path / "prompts.jsonl"
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    table.write_text("".join(json.dumps({"prompt": one, "chosen": "x"}) + "\n" for one in ("Hello", talk)))
    assert [shown(one) for one in read_prompts(str(table))] == ["Hello", "system: Be kind.\n\nuser: Why?"]
    assert len(read_prompts("")) >= 48
    assert len(read_prompts("demo:warm")) > 10


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": ""}\n', "line 1, field 'prompt': it must be a text, or a list of messages"),
        ("a.jsonl", '{"question": "x"}\n', "line 1, field 'prompt': it must be a text"),
        ("a.jsonl", '{"prompt": [{"role": "king", "content": "x"}]}\n', "a message has a role"),
        ("a.txt", "\n", "it holds no prompt"),
    ],
)
def test_prompts_that_cannot_be_read(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_prompts(str(path))
