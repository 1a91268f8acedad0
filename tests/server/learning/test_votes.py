"""What feedback says about pairs of answers, and how much each vote counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from server.feedback.items import Answer, Kind, Stored
from server.learning.votes import Vote, VoteRules, votes_of
from steering_vectors.data.chat import Example, Message
from steering_vectors.errors import FitError


def stored(kind: Kind, value: Mapping[str, Any], *texts: str, prompt: Any = "p", user: str | None = None) -> Stored:
    answers: tuple[Answer, ...] = tuple({"prompt": prompt, "text": text} for text in texts)
    return Stored(1, "fb", 1.0, "", "", user, kind, value, None, "", answers, [None] * len(texts))


def pair(chosen: str, rejected: str, **more: Any) -> Stored:
    return stored("pair", {"better": "a"}, chosen, rejected, **more)


def thumb(text: str, up: bool, **more: Any) -> Stored:
    return stored("thumb", {"thumb": "up" if up else "down"}, text, **more)


def read(*given: Stored, rules: VoteRules | None = None) -> tuple[list[Vote], Counter[str]]:
    left_out: Counter[str] = Counter()
    return votes_of(given, rules or VoteRules(), left_out), left_out


def texts(votes: list[Vote]) -> list[tuple[str, str, float]]:
    return [(vote.chosen.completion, vote.rejected.completion, vote.weight) for vote in votes]


def test_pairs_and_edits_are_votes() -> None:
    found, left_out = read(
        pair("a", "b"),
        stored("pair", {"better": "b"}, "c", "d", prompt=[{"role": "user", "content": "q"}], user="u"),
        stored("edit", {"corrected": "f"}, "e"),
    )
    assert texts(found) == [("a", "b", 1.0), ("d", "c", 1.0), ("f", "e", 1.0)]
    assert found[1].chosen == Example((Message("user", "q"),), "d")
    assert [vote.user for vote in found] == [None, "u", None]
    assert not left_out


def test_good_and_bad_answers_to_one_prompt_make_pairs() -> None:
    found, left_out = read(
        thumb("a", True),
        thumb("b", True),
        stored("rating", {"rating": 1, "min": 1, "max": 5}, "c"),
        thumb("x", True, prompt="q"),
    )
    assert texts(found) == [("a", "c", 0.5), ("b", "c", 0.5)]  # together as much as the one bad answer
    assert left_out == {"no good and bad answer to its prompt": 1}


def test_what_makes_no_vote_is_counted() -> None:
    found, left_out = read(
        stored("pair", {"better": "tie"}, "a", "b"),
        stored("signal", {"signal": "copied"}, "a"),
        stored("comment", {"comment": "hm"}, "a"),
        stored("rating", {"rating": 3, "min": 1, "max": 5}, "a"),
        pair("a", "b", prompt=[1, 2]),
        pair("a", " "),
    )
    assert found == []
    assert left_out == {
        "a tie": 1,
        "it is a signal": 1,
        "it is a comment": 1,
        "the middle of the scale": 1,
        "the prompt is token ids": 1,
        "it cannot be fitted on: it contains only whitespace": 1,
    }


def test_of_votes_on_the_same_texts_the_users_last_one_counts() -> None:
    found, left_out = read(
        pair("a", "b", user="u"), pair("b", "a", user="u"), pair("a", "b", user="v"), pair("a", "b"), pair("a", "b"),
        thumb("c", True, user="u"), thumb("c", False, user="u"), thumb("d", True, user="u"),
    )  # fmt: skip
    assert texts(found) == [("b", "a", 1.0), ("a", "b", 1.0), ("a", "b", 1.0), ("d", "c", 1.0)]
    assert left_out == {"a later vote of the same user on the same texts": 3}


def test_a_user_counts_at_most_so_much() -> None:
    flood = [pair(f"a{number}", "b", user="bot") for number in range(1000)]
    found, left_out = read(*flood, pair("a", "b", user="u"), pair("a", "b"), rules=VoteRules(max_user_votes=10))
    weights: Counter[str | None] = Counter()
    for vote in found:
        weights[vote.user] += vote.weight  # type: ignore[assignment]
    assert weights == {"bot": pytest.approx(10), "u": 1, None: 1}
    assert not left_out


def test_users_have_weights_of_their_own() -> None:
    rules = VoteRules(user_weights={"bot": 0.0, "expert": 2.0})
    found, left_out = read(
        pair("a", "b", user="bot"), pair("a", "b", user="expert"), pair("a", "b", user="u"), rules=rules
    )
    assert [(vote.user, vote.weight) for vote in found] == [("expert", 2.0), ("u", 1.0)]
    assert left_out == {"its user has the weight 0": 1}


@pytest.mark.parametrize(
    "rules", [{"max_user_votes": 0}, {"user_weights": {"u": -1}}, {"user_weights": {"u": float("nan")}}]
)
def test_rules_that_cannot_be_used(rules: dict[str, Any]) -> None:
    with pytest.raises(FitError):
        VoteRules(**rules)
