"""The brief of a profile: from templates, from a writer's replies, and from files that somebody wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from steering_vectors.errors import DataError, FitError
from steering_vectors.models.loading import LanguageModel
from steering_vectors.synthesis.brief import INSTRUCTIONS, QUESTIONS, brief_in, json_list
from steering_vectors.synthesis.folder import Folder
from steering_vectors.synthesis.templates import Trait
from steering_vectors.synthesis.writers import Ask, Length, LocalWriter, Voice, Written

TRAIT = Trait("more cautious about medical advice")


class Scripted:
    """A writer that gives these replies, one after the other."""

    name = "scripted"

    def __init__(self, *replies: str) -> None:
        self.replies, self.asks = list(replies), list[Ask]()

    def source(self, voice: Voice) -> str:
        return self.name

    def write(self, asks: Sequence[Ask], length: Length) -> Iterator[Written]:
        for ask in asks:
            self.asks.append(ask)
            yield Written(self.replies.pop(0) if self.replies else "I cannot do that.", True)


def pairs(*numbers: int) -> str:
    return json.dumps([{"positive": f"Be careful {one}.", "negative": f"Be careless {one}."} for one in numbers])


def questions(*numbers: int) -> str:
    return json.dumps([f"What about {one}?" for one in numbers])


def test_templates_hold_out_every_fourth_question(tmp_path: Path) -> None:
    brief = brief_in(Folder(tmp_path), TRAIT, instructions=3, questions=16, writer=None)
    assert len(brief.instructions) == 3
    assert [one.held_out for one in brief.questions] == [False, False, False, True] * 4


def test_a_writer_is_asked_until_there_is_enough(tmp_path: Path) -> None:
    replies = (f"Sure! Here it is:\n```json\n{pairs(1, 2)}\n```", "No.", pairs(2, 3))
    writer = Scripted(*replies, questions(*range(10)), questions(*range(8, 18)), questions(18, 19))
    brief = brief_in(Folder(tmp_path), TRAIT, instructions=3, questions=20, writer=writer)
    assert [one.positive for one in brief.instructions] == ["Be careful 1.", "Be careful 2.", "Be careful 3."]
    assert [one.text for one in brief.questions] == [f"What about {one}?" for one in range(20)]
    assert "more cautious about medical advice" in writer.asks[0].messages[0].content
    assert writer.asks[0].schema is not None
    assert writer.asks[0].schema["maxItems"] == 3
    assert len({ask.seed for ask in writer.asks[:3]}) == 3
    asked = len(writer.asks)
    assert brief_in(Folder(tmp_path), TRAIT, instructions=9, questions=9, writer=writer) == brief
    assert len(writer.asks) == asked


@pytest.mark.parametrize(
    ("replies", "file"), [((), INSTRUCTIONS), ((pairs(1), '[{"positive": "x"}]', questions(1)), QUESTIONS)]
)
def test_a_writer_that_writes_nothing_usable(tmp_path: Path, replies: tuple[str, ...], file: str) -> None:
    with pytest.raises(
        FitError, match=rf"scripted wrote too little that can be used for {file}: .* --writer templates"
    ):
        brief_in(Folder(tmp_path), TRAIT, instructions=2, questions=20, writer=Scripted(*replies))


def test_a_small_model_is_told_to_use_templates(
    demo: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steering_vectors.synthesis.brief.WRITING", Length(8))
    with pytest.raises(FitError, match=r"demo \(\w{8}\) wrote too little"):
        brief_in(Folder(tmp_path), TRAIT, instructions=1, questions=12, writer=LocalWriter(demo))


def test_files_that_somebody_wrote_are_used(tmp_path: Path) -> None:
    (tmp_path / INSTRUCTIONS).write_text(pairs(7)[1:-1] + "\n")
    rows = [json.dumps({"question": f"Why {one}?"}) for one in (*range(8), 3)]
    (tmp_path / QUESTIONS).write_text("\n".join(rows))
    brief = brief_in(Folder(tmp_path), TRAIT, instructions=5, questions=40, writer=None)
    assert [one.negative for one in brief.instructions] == ["Be careless 7."]
    assert [one.text for one in brief.questions] == [f"Why {one}?" for one in range(8)]
    (tmp_path / INSTRUCTIONS).write_text('{"positive": "Same.", "negative": "Same."}\n')
    with pytest.raises(DataError, match=r"instructions\.jsonl: both instructions are equal"):
        brief_in(Folder(tmp_path), TRAIT, instructions=5, questions=40, writer=None)
    (tmp_path / INSTRUCTIONS).write_text("\n")
    with pytest.raises(DataError, match="it holds no pair of instructions"):
        brief_in(Folder(tmp_path), TRAIT, instructions=5, questions=40, writer=None)
    (tmp_path / INSTRUCTIONS).unlink()
    (tmp_path / QUESTIONS).write_text(rows[0])
    with pytest.raises(DataError, match="at least 8 different questions"):
        brief_in(Folder(tmp_path), TRAIT, instructions=5, questions=40, writer=None)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('["a", "b"] and more', ["a", "b"]),
        ('Well: ["a", "b", "c', ["a", "b"]),
        ("[", []),
        ("none", []),
        ('[{"a": 1}, {"a"', [{"a": 1}]),
    ],
)
def test_lists_in_replies(text: str, found: list[object]) -> None:
    assert list(json_list(text)) == found
