"""Votes: what stored feedback says about pairs of answers, and how much each counts.

A pair or an edit is a vote. A thumb or a rating says something about one answer: the good ones and the bad ones to the
same prompt make pairs. What makes none is counted, with the reason.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import cast

from server.feedback.items import Stored
from server.feedback.trl import OF_ROWS, Exported, Row, trl_rows
from server.learning.held_out import pair_key, prompt_key
from steering_vectors.data.chat import Example
from steering_vectors.data.records import read_record
from steering_vectors.data.tables import BadRow
from steering_vectors.errors import FitError

MAX_USER_VOTES = 200.0


@dataclass(frozen=True, slots=True)
class Vote:
    """One answer that somebody preferred to another one. `key` stands for the prompt."""

    chosen: Example
    rejected: Example
    key: str
    user: str | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class VoteRules:
    """How much votes count. A user's votes count at most as `max_user_votes` together, and each counts by the weight of
    its user, which is 1 unless `user_weights` has another; a user of weight 0 does not count. Votes without a user are
    not bounded. Raises FitError for values that cannot be used."""

    max_user_votes: float = MAX_USER_VOTES
    user_weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.max_user_votes > 0:
            raise FitError(f"max_user_votes must be positive, not {self.max_user_votes:g}")
        if any(not 0 <= weight < float("inf") for weight in self.user_weights.values()):
            raise FitError("the weights of users must be finite and not negative")


def votes_of(stored: Iterable[Stored], rules: VoteRules, left_out: Counter[str]) -> list[Vote]:
    """The votes of feedback in the order of its storage. Why feedback makes none is counted in `left_out`.

    Of the votes of one user, or of all without one, on the same two texts, the last counts. So nothing counts twice
    because it was sent twice.
    """
    votes: dict[object, Vote] = {}
    judged: dict[object, _Judged] = {}
    seen = 0
    for one in stored:
        counts = Exported()
        for row in trl_rows([one], "preference" if one.kind in OF_ROWS["preference"] else "unpaired", counts):
            seen += _note(row, one.user, votes, judged, left_out)
        left_out.update(_shown(counts.left_out))
    repeated = seen - len(votes) - len(judged)
    if repeated:
        left_out["a later vote of the same user on the same texts"] += repeated
    return _weighed([*votes.values(), *_paired(list(judged.values()), left_out)], rules, left_out)


@dataclass(frozen=True, slots=True)
class _Judged:
    """An answer that somebody found good or bad."""

    example: Example
    good: bool
    user: str | None


def _note(
    row: Row, user: str | None, votes: dict[object, Vote], judged: dict[object, _Judged], left_out: Counter[str]
) -> int:
    """Note what a row says, in place of what the same user said of the same texts before. Returns 1, or 0 for a row
    that cannot be read."""
    unpaired = "label" in row
    try:
        record = read_record("unpaired" if unpaired else "preference", row)
    except BadRow as bad:
        left_out[f"it cannot be fitted on: {bad.message}"] += 1
        return 0
    if unpaired:
        example = cast(Example, record.positive or record.negative)
        place = (user, example)
        judged.pop(place, None)
        judged[place] = _Judged(example, record.positive is not None, user)
        return 1
    assert record.positive is not None
    assert record.negative is not None
    same = (user, record.positive.prompt, frozenset({record.positive.completion, record.negative.completion}))
    votes.pop(same, None)
    votes[same] = Vote(record.positive, record.negative, pair_key(record.positive, record.negative), user)
    return 1


def _paired(judged: Sequence[_Judged], left_out: Counter[str]) -> list[Vote]:
    """Pairs of a good and a bad answer to one prompt. Those of a prompt count together as the fewer of both sides."""
    by_prompt: dict[object, tuple[list[_Judged], list[_Judged]]] = defaultdict(lambda: ([], []))
    for one in judged:
        by_prompt[one.example.prompt][0 if one.good else 1].append(one)
    found = []
    for good, bad in by_prompt.values():
        pairs = [(up, down) for up, down in product(good, bad) if up.example != down.example]
        if not pairs:
            left_out["no good and bad answer to its prompt"] += len(good) + len(bad)
            continue
        weight = min(len(good), len(bad)) / len(pairs)
        for up, down in pairs:
            user = up.user if up.user == down.user else None
            key = prompt_key(up.example.prompt, up.example.completion, down.example.completion)
            found.append(Vote(up.example, down.example, key, user, weight))
    return found


def _weighed(votes: Sequence[Vote], rules: VoteRules, left_out: Counter[str]) -> list[Vote]:
    totals: dict[str, float] = defaultdict(float)
    for vote in votes:
        if vote.user is not None:
            totals[vote.user] += vote.weight
    found = []
    for vote in votes:
        share = 1.0
        if vote.user is not None:
            share = rules.user_weights.get(vote.user, 1.0) * min(1.0, rules.max_user_votes / totals[vote.user])
        if share:
            found.append(replace(vote, weight=vote.weight * share))
        else:
            left_out["its user has the weight 0"] += 1
    return found


def _shown(reasons: Mapping[str, int]) -> dict[str, int]:
    """The reasons of an export, in which a signal or a comment has no row."""
    return {
        ("it is a " + reason.partition(":")[0] if ": no " in reason else reason): n for reason, n in reasons.items()
    }
