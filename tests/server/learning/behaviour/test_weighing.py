"""Signals become weighed votes; attacks move what votes say by less than the bounds that docs/behaviour.md states."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from benchmarks.learning.crowd import Crowd, Seen, shared_out, signal, stored
from server.feedback.items import Answer, Stored
from server.learning.behaviour.likelihoods import Likelihoods
from server.learning.behaviour.signals import behaviours_of
from server.learning.behaviour.weighing import BehaviourReport, SignalSettings, signal_votes, weighed_votes
from server.learning.held_out import is_held_out
from server.learning.votes import Vote, VoteRules
from steering_vectors.errors import FitError
from tests.server.learning.behaviour.worlds import TRUTH, cosine, direction, world

FRACTION = 0.4
PEOPLE, PAIRS = 20, 600


def learned(given: list[Stored], **settings: Any) -> tuple[list[Vote], BehaviourReport, Counter[str]]:
    left_out: Counter[str] = Counter()
    votes, report = weighed_votes(given, VoteRules(), SignalSettings(**settings), FRACTION, left_out)
    return votes, report, left_out


def people(seed: int, noise: float = 0.2) -> list[Stored]:
    crowd = Crowd(seed, noise)
    return [one for user, pairs in shared_out(world(seed, PAIRS), PEOPLE).items() for one in crowd.votes(user, pairs)]


def bots(seed: int, side: str, count: int = PAIRS // 4, users: int = 5) -> list[Stored]:
    """A fifth of all feedback by default."""
    crowd = Crowd(100 + seed)
    pairs = shared_out(world(100 + seed, count), users, "bot")
    return [one for user, own in pairs.items() for one in crowd.one_sided(user, own, side)]


def share_of_bots(votes: list[Vote]) -> float:
    total = sum(vote.weight for vote in votes)
    return sum(vote.weight for vote in votes if str(vote.user).startswith("bot")) / total


def moved(seed: int, attack: list[Stored]) -> tuple[float, float]:
    """The cosine to the direction of people alone, and the share that bots have."""
    clean = direction(learned(people(seed))[0])
    votes, _, _ = learned([*people(seed), *attack])
    return cosine(direction(votes), clean), share_of_bots(votes)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("side", ["first", "worse"])
def test_a_fifth_of_bots_that_prefer_one_side(side: str, seed: int) -> None:
    found, share = moved(seed, bots(seed, side))
    assert found > 0.95
    assert share < 0.2


def test_a_flood_of_duplicates_changes_nothing() -> None:
    once = bots(0, "worse", 1, 1)
    assert np.array_equal(direction(learned([*people(0), *once])[0]), direction(learned([*people(0), *once * 2000])[0]))


def test_a_user_with_a_thousand_votes_has_a_tenth() -> None:
    found, share = moved(0, bots(0, "worse", 1000, 1))
    assert found > 0.95
    assert share <= 0.1 + 1e-9


def test_signals_alone_point_where_votes_do() -> None:
    """With a fifth of spam and three in ten wrong."""
    crowd = Crowd(3, 0.3)
    pairs = shared_out(world(3, PAIRS), PEOPLE)
    given = [one for user, own in pairs.items() for one in crowd.signals(user, own)]
    spam = [one for user, own in shared_out(world(4, PAIRS // 4), 5, "bot").items() for one in crowd.spam(user, own)]
    said, _, _ = learned([one for user, own in pairs.items() for one in crowd.votes(user, own)])
    votes, report, _ = learned([*given, *spam])
    assert report["signal_votes"] == len(votes) > 0.9 * PAIRS
    assert cosine(direction(votes), TRUTH) > 0.8 * cosine(direction(said), TRUTH)
    assert share_of_bots(votes) < 0.15


def test_what_one_user_did_with_two_answers_is_a_vote() -> None:
    good: Answer = {"prompt": "p", "text": "good"}
    bad: Answer = {"prompt": "p", "text": "bad"}
    given = [
        signal("u", good, "copied"), signal("u", bad, "regenerated"),
        signal("v", good, "copied"), signal("v", bad, "copied"),
        signal("w", good, "copied"), signal(None, bad, "copied"),
    ]  # fmt: skip
    left_out: Counter[str] = Counter()
    (vote,) = signal_votes(behaviours_of(given), Likelihoods(), left_out)
    assert (vote.chosen.completion, vote.rejected.completion, vote.user) == ("good", "bad", "u")
    assert vote.weight == pytest.approx(np.tanh(1.5))
    assert left_out == {
        "equal signals on two answers": 1,
        "signals on the only answer that a user reacted to of its prompt": 1,
        "signals of nobody known on an answer": 1,
    }


def test_what_a_user_says_counts_instead_of_signals() -> None:
    pair = Seen("p", "good", "bad")
    given = [
        signal("u", pair.answers[0], "regenerated"), signal("u", pair.answers[1], "copied"),
        stored("pair", {"better": "a"}, "u", pair.answers),
    ]  # fmt: skip
    votes, report, _ = learned(given)
    assert [(vote.chosen.completion, vote.weight) for vote in votes] == [("good", 1.0)]
    assert report["signal_votes"] == 0


def test_held_out_prompts_move_no_weight() -> None:
    """Likelihoods and users' weights are the same whatever was said on prompts that are held out."""
    crowd = Crowd(5, 0.2)
    given = [one for user, own in shared_out(world(5, 200), 10).items() for one in crowd.signals(user, own, judged=1.0)]
    said, turned = {"a": "b", "b": "a"}, []
    for one in given:
        held = is_held_out(f'["{one.answers[0]["prompt"]}"]', FRACTION)
        if held and one.kind == "pair":
            one = stored("pair", {"better": said[one.value["better"]]}, one.user, one.answers)
        turned.append(one)
    assert turned != given
    first, second = learned(given)[1], learned(turned)[1]
    assert (first["log_odds"], first["lowest"]) == (second["log_odds"], second["lowest"])


@pytest.mark.parametrize("values", [{"prior_judgements": 0.0}, {"max_user_share": 0.0}, {"max_user_share": 1.5}])
def test_settings_that_cannot_be_used(values: dict[str, Any]) -> None:
    with pytest.raises(FitError):
        SignalSettings(**values)
