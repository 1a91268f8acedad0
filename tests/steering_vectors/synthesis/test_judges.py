"""Judges: log-probabilities equal plain passes, positions are no reasons, and a person's file is filled and read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from steering_vectors.data.chat import Message, continuation, encode_prompt
from steering_vectors.errors import DataError, FitError
from steering_vectors.models.loading import LanguageModel
from steering_vectors.synthesis.folder import Folder
from steering_vectors.synthesis.judges import (
    WORDINGS,
    Case,
    ModelJudge,
    PersonJudge,
    Rule,
    Vote,
    decide,
    judged,
    position_bias,
)

CASES = [
    Case("Which answer is kinder?", "How do I make tea?", "Heat the water, dear.", "Leave me alone."),
    Case("Which answer is kinder?", "Help.", "No.", "Of course, my friend.", (("I am short.", "I am kind."),)),
]


def test_the_model_judge_reads_what_a_plain_pass_computes(demo: LanguageModel) -> None:
    judge = ModelJudge(demo, wordings=2)
    for case, votes in zip(CASES, judge.votes(CASES), strict=True):
        assert [(vote.wording, vote.swapped) for vote in votes] == [(0, False), (0, True), (1, False), (1, True)]
        for vote in votes:
            text = WORDINGS[vote.wording].format(case=case.shown(vote.swapped), question=case.question)
            ids = encode_prompt(demo.tokenizer, (Message("user", text),))
            with torch.no_grad():
                logs = demo.model(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
            starts = {
                letter: {continuation(demo.tokenizer, ids, one)[0] for one in (letter, f" {letter}")} for letter in "AB"
            }
            shared = starts["A"] & starts["B"]
            a, b = (float(torch.logsumexp(logs[sorted(starts[one] - shared)], 0)) for one in "AB")
            expected = b - a if vote.swapped else a - b
            assert vote.log_odds == pytest.approx(expected, abs=1e-3)
            assert vote.mass == pytest.approx(math.exp(a) + math.exp(b), rel=1e-3)


def test_a_case_shows_the_sides_and_their_arguments_in_both_orders() -> None:
    plain, swapped = CASES[1].shown(False), CASES[1].shown(True)
    assert "Answer A:\nNo.\n\nAnswer B:\nOf course" in plain
    assert "The author of Answer A says:\nI am short." in plain
    assert "Answer B:\nNo." in swapped
    assert "The author of Answer B says:\nI am short." in swapped


def both(first: float, bias: float, wording: int = 0) -> list[Vote]:
    """Votes of a judge that finds the first answer better by `first`, and likes A by `bias`."""
    return [Vote(first + bias, False, wording), Vote(first - bias, True, wording)]


def test_a_preference_for_a_position_is_removed() -> None:
    odds = [1.0, -1.0, 0.2, 2.0]
    votes = [both(one, 3.0) for one in odds]
    assert position_bias([vote for one in votes for vote in one])[0] == pytest.approx(3.0)
    found = decide(votes, Rule(confidence=0.6), biased=True)
    assert [one.log_odds for one in found] == pytest.approx(odds)
    assert [one.outcome for one in found] == ["first", "second", "unsure", "first"]
    assert all(one.consistent for one in found)
    kept = decide(votes, Rule(), biased=False)  # a person's votes are taken as they are
    assert {one.outcome for one in kept} == {"inconsistent"}


def test_a_verdict_that_depends_on_the_order_does_not_count() -> None:
    votes = [both(0.0, 0.0), [Vote(2.0, False), Vote(-1.0, True)], both(1.0, -1.5)]
    found = decide(votes, Rule(), biased=True)
    assert found[0].outcome in ("unsure", "inconsistent")
    assert found[1].outcome == "inconsistent"
    assert not found[1].consistent


def test_wordings_must_agree() -> None:
    votes = [[*both(2.0, 0.5), *both(-0.5, 1.0, wording=1)]]
    (found,) = decide(votes, Rule(), biased=True)
    assert (found.outcome, found.agreement) == ("inconsistent", 0.5)
    (found,) = decide(votes, Rule(agreement=0.5), biased=True)
    assert found.outcome == "first"
    assert found.probability == pytest.approx(1 / (1 + math.exp(-0.75)))


def test_no_votes_make_no_decisions() -> None:
    assert decide([], Rule(), biased=True) == []


@pytest.mark.parametrize("confidence", [0.4, 1.0])
def test_a_confidence_that_is_none(confidence: float) -> None:
    with pytest.raises(FitError, match=r"confidence must be from 0\.5 to below 1"):
        Rule(confidence)


def test_votes_are_kept_and_only_new_cases_are_judged(demo: LanguageModel, tmp_path: Path) -> None:
    folder, judge = Folder(tmp_path), ModelJudge(demo)
    steps: list[tuple[int, int]] = []
    first = judged(folder, "verdicts.jsonl", judge, CASES[:1])
    both_cases = judged(
        folder, "verdicts.jsonl", judge, CASES, lambda _, done, total, detail="": steps.append((done, total))
    )
    assert steps == [(2, 2)]
    assert [round(vote.log_odds, 5) for vote in first[0]] == [vote.log_odds for vote in both_cases[0]]
    before = folder.file("verdicts.jsonl").read_bytes()
    assert judged(folder, "verdicts.jsonl", judge, [*CASES, *CASES])[2:] == judged(
        folder, "verdicts.jsonl", judge, CASES
    )
    assert folder.file("verdicts.jsonl").read_bytes() == before
    row = json.loads(before.splitlines()[0])
    folder.write("verdicts.jsonl", [{**row, "votes": [{}]}])
    with pytest.raises(DataError, match="has no votes that can be read"):
        judged(folder, "verdicts.jsonl", judge, CASES)


def test_a_case_that_is_too_long_for_the_judge(demo: LanguageModel) -> None:
    long = Case("Which?", "Help.", "word " * 600, "b")
    with pytest.raises(DataError, match="but its context holds 512: use shorter answers"):
        list(ModelJudge(demo).votes([long]))


def many(count: int) -> list[Case]:
    return [Case("Which is longer?", f"Prompt {place}", f"{place} " * 3, f"{place}") for place in range(count)]


def fill(folder: Folder, file: str, answer: str = "") -> None:
    """Fill a file of ballots: by the longer text, or always with `answer`."""
    rows = folder.rows(file)
    longer = ["a" if len(row["a"]) > len(row["b"]) else "b" for row in rows]
    folder.write(file, [{**row, "better": answer or better} for row, better in zip(rows, longer, strict=True)])


def test_a_person_fills_a_file(tmp_path: Path) -> None:
    folder, cases = Folder(tmp_path), many(60)
    judge = PersonJudge(folder)
    with pytest.raises(DataError, match=r"ballots\.jsonl: \d+ of \d+ comparisons have no answer yet"):
        list(judge.votes(cases))
    rows = folder.rows("ballots.jsonl")
    again = [row for row in rows if row["key"].endswith("+")]
    assert 60 < len(rows) == 60 + len(again)
    firsts = [row["a"] == case.first for row, case in zip(rows, cases, strict=False)]
    assert 15 < sum(firsts) < 45  # which answer is a is drawn
    fill(folder, "ballots.jsonl")
    found = decide(list(judge.votes(cases)), Rule(0.9), biased=judge.biased)
    assert {one.outcome for one in found} == {"first"}
    fill(folder, "ballots.jsonl", "a")
    outcomes = [one.outcome for one in decide(list(judge.votes(cases)), Rule(0.9), biased=False)]
    assert outcomes.count("inconsistent") == len(again)  # who always says a contradicts himself
    fill(folder, "ballots.jsonl", "tie")
    assert {one.outcome for one in decide(list(judge.votes(cases)), Rule(), biased=False)} == {"unsure"}
    fill(folder, "ballots.jsonl", "both")
    with pytest.raises(DataError, match="is 'both', not one of a, b, tie"):
        list(judge.votes(cases))
