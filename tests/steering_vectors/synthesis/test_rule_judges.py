"""Rules decide between two answers as they say, and what is no rule is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from steering_vectors.errors import FitError
from steering_vectors.synthesis.judges import Case, Rule, decide
from steering_vectors.synthesis.rule_judges import RuleJudge, parse_rule


def outcome(judge: RuleJudge, first: str, second: str) -> str:
    votes = list(judge.votes([Case("Which?", "Hello?", first, second)]))
    return decide(votes, Rule(0.9), biased=judge.biased)[0].outcome


def test_lengths_count_words() -> None:
    assert outcome(parse_rule("length:short"), "one two", "one two three") == "first"
    assert outcome(parse_rule("length:long"), "one two", "one two three") == "second"
    assert outcome(parse_rule("length:long"), "one two", "three four") == "unsure"


def test_words_count_by_their_share(tmp_path: Path) -> None:
    path = tmp_path / "kind.txt"
    path.write_text("Thanks\n\nplease\n", encoding="utf-8")
    more, fewer = parse_rule(f"words:{path}"), parse_rule(f"no-words:{path}")
    assert outcome(more, "Thanks!", "Thanks, but this is long.") == "first"
    assert outcome(fewer, "Thanks!", "Thanks, but this is long.") == "second"
    assert outcome(more, "", "no") == "unsure"
    name = more.name
    path.write_text("thanks\n", encoding="utf-8")
    assert parse_rule(f"words:{path}").name != name  # so verdicts by other words are not used again


def vowels(prompt: str, answer: str) -> float:
    return sum(answer.count(one) for one in "aeiou") - 10.0 * (prompt in answer)


def spoilt(prompt: str, answer: str) -> float:
    return float("nan")


def test_a_function_scores_the_prompt_and_the_answer() -> None:
    judge = parse_rule(f"{__name__}:vowels")
    assert outcome(judge, "aaa", "a") == "first"
    assert outcome(judge, "aaa Hello?", "a") == "second"
    with pytest.raises(FitError, match="spoilt gives no number for 'one'"):
        outcome(parse_rule(f"{__name__}:spoilt"), "one", "two")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("length", "is none of words:FILE"),
        ("length:medium", "cannot be imported"),
        ("words:", "is none of"),
        ("words:/nowhere/words.txt", r"cannot be read as UTF-8 \(FileNotFoundError\)"),
        ("json:nothing", "cannot be imported"),
        ("math:pi", "is no function"),
    ],
)
def test_what_is_no_rule_is_named(text: str, message: str) -> None:
    with pytest.raises(FitError, match=message):
        parse_rule(text)


def test_an_empty_list_of_words_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(FitError, match="has no words"):
        parse_rule(f"words:{tmp_path / 'none.txt'}")
