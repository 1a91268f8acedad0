"""Users' weights against simulated users, whose mistakes are known."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.learning.crowd import Crowd, shared_out
from server.learning.behaviour.plausibility import plausibilities
from server.learning.behaviour.reliability import capped, reliabilities
from server.learning.behaviour.signals import behaviours_of
from server.learning.votes import Vote, VoteRules, votes_of
from steering_vectors.data.chat import Example
from tests.server.learning.behaviour.worlds import world


def test_users_on_the_same_pairs_are_compared_by_what_they_say() -> None:
    """Whoever votes by a coin, or against everyone, on the same forty pairs."""
    pairs = world(0, 40)
    crowd = Crowd(0, 0.1)
    given = [one for number in range(8) for one in crowd.votes(f"person-{number}", pairs)]
    given += Crowd(1, 0.5).votes("coin", pairs) + Crowd(2, 1.0).votes("against", pairs)
    found = reliabilities(votes_of(given, VoteRules(), Counter()))
    assert found["against"] == 0.0
    assert found["coin"] < 0.5
    assert min(found[f"person-{number}"] for number in range(8)) > 0.8


def test_users_without_a_common_pair_are_compared_by_a_classifier() -> None:
    crowd, pairs = Crowd(0, 0.1), shared_out(world(0, 800), 20)
    bad = {"person-0": Crowd(1, 0.5), "person-1": Crowd(2, 1.0)}
    given = [one for user, own in pairs.items() for one in bad.get(user, crowd).votes(user, own)]
    found = reliabilities(votes_of(given, VoteRules(), Counter()))
    others = [weight for user, weight in found.items() if user not in bad]
    assert found["person-1"] < 0.2
    assert found["person-0"] < sorted(others)[2]
    assert sum(others) / len(others) > 0.9


def test_two_users_cannot_outvote_each_other() -> None:
    pairs = world(0, 20)
    given = Crowd(0).votes("a", pairs) + Crowd(0, 1.0).votes("b", pairs)
    assert reliabilities(votes_of(given, VoteRules(), Counter())) == {"a": 1.0, "b": 1.0}


def vote(user: str | None, number: int) -> Vote:
    return Vote(Example("p", f"a{number}"), Example("p", f"b{number}"), f"p{number}", user)


def test_a_users_share_is_bounded_and_few_users_are_not() -> None:
    given = [vote("flood", number) for number in range(1000)]
    given += [vote(f"u{number % 20}", 1000 + number) for number in range(200)]
    given.append(vote(None, 5000))
    found = capped(given, 0.1)
    totals: Counter[str | None] = Counter()
    for one in found:
        totals[one.user] += one.weight  # type: ignore[assignment]
    assert totals["flood"] == pytest.approx(0.1 * (totals["flood"] + 200))
    assert totals["u0"] == 10
    assert totals[None] == 1
    assert capped(given[:1000], 0.1) == given[:1000]
    assert capped([], 0.1) == []


def test_behaviour_that_has_nothing_to_do_with_answers_is_doubted() -> None:
    crowd = Crowd(0)
    given = [one for user, own in shared_out(world(0, 600), 20).items() for one in crowd.signals(user, own)]
    given += [one for user, own in shared_out(world(1, 150), 5, "spam").items() for one in crowd.spam(user, own)]
    found = plausibilities(behaviours_of(given), {})
    spam = [weight for user, weight in found.items() if user.startswith("spam")]
    people = [weight for user, weight in found.items() if user.startswith("person")]
    assert sum(spam) / len(spam) < 0.5
    assert sum(people) / len(people) > 0.9


def test_few_behaviours_condemn_nobody() -> None:
    given = Crowd(0).spam("spam", world(0, 5))
    assert plausibilities(behaviours_of(given), {}) == {"spam": 1.0}
