"""From feedback with signals to weighed votes: reinforcement learning from human behaviour (RLHB, arXiv:2405.00578)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from typing_extensions import TypedDict

from server.feedback.items import Stored
from server.learning.behaviour.likelihoods import (
    PRIOR_JUDGEMENTS,
    Calibration,
    Likelihoods,
    fit_likelihoods,
    judgements_of,
)
from server.learning.behaviour.plausibility import plausibilities
from server.learning.behaviour.reliability import MAX_USER_SHARE, capped, reliabilities
from server.learning.behaviour.signals import SIGNALS, Behaviour, behaviours_of, key_of
from server.learning.held_out import is_held_out
from server.learning.votes import Vote, VoteRules, votes_of
from steering_vectors.errors import FitError

TURNS = 2
MIN_WEIGHT = 0.05  # of a user whose thumbs and ratings count; they may meet those of others in a pair


@dataclass(frozen=True, slots=True)
class SignalSettings:
    """How signals become votes.

    - `prior_judgements`: as how many explicit judgements of each signal the prior likelihoods count.
    - `max_user_share`: the share of all votes with users that one user's votes may weigh together.
    - `discriminator`: whether behaviours that do not depend on answers lower a user's weight.

    Raises FitError for values that cannot be used.
    """

    prior_judgements: float = PRIOR_JUDGEMENTS
    max_user_share: float = MAX_USER_SHARE
    discriminator: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.prior_judgements < float("inf"):
            raise FitError(f"prior_judgements must be positive, not {self.prior_judgements:g}")
        if not 0 < self.max_user_share <= 1:
            raise FitError(f"max_user_share must be above 0 and at most 1, not {self.max_user_share:g}")


class BehaviourReport(TypedDict):
    """What signals were found to say. `log_odds` are by signal, with the standard error of each, and `judgements` is
    how many explicit judgements they come from beside the prior. `calibration` is None for few. `users` counts all
    that votes and signals come from, `doubted` those whose weight is below ½; `lowest` are the weights of the ten that
    count least. `signal_votes` are votes made of signals."""

    log_odds: dict[str, tuple[float, float]]
    judgements: int
    calibration: Calibration | None
    behaviours: int
    signal_votes: int
    users: int
    doubted: int
    lowest: dict[str, float]


def weighed_votes(
    stored: Sequence[Stored],
    rules: VoteRules,
    settings: SignalSettings,
    heldout_fraction: float,
    left_out: Counter[str],
) -> tuple[list[Vote], BehaviourReport]:
    """Explicit votes and votes made of signals, each weighed by its user.

    Likelihoods, reliability and plausibility are fitted in two turns, each with the weights of the one before, and on
    prompts only that are not held out. A vote made of signals counts by 2p − 1, where p is the probability that it is
    right, so that votes that may be wrong move a mean as far as certain ones would that are right as often.
    """
    behaviours = behaviours_of(stored)
    seen = [one for one in behaviours if not is_held_out(one.key, heldout_fraction)]
    said = [one for one in stored if one.kind not in ("signal", "comment") and not _held_out(one, heldout_fraction)]
    explicit = votes_of(said, rules, Counter())
    trusted: dict[str, float] = dict(rules.user_weights)
    likelihoods = Likelihoods()
    for _ in range(TURNS):
        likelihoods = fit_likelihoods(judgements_of(said, seen, trusted), settings.prior_judgements)
        votes = _without_repeats(signal_votes(seen, likelihoods, Counter()), explicit)
        weights = reliabilities([*votes, *explicit], trusted)
        if settings.discriminator:
            plausible = plausibilities(seen, weights)
            weights = {user: weights.get(user, 1.0) * plausible.get(user, 1.0) for user in {*weights, *plausible}}
        trusted = {user: weight * rules.user_weights.get(user, 1.0) for user, weight in weights.items()}
    trusted = {**rules.user_weights, **trusted}
    explicit = votes_of(_trusted(stored, trusted, left_out), VoteRules(rules.max_user_votes, trusted), left_out)
    implicit = _without_repeats(signal_votes(behaviours, likelihoods, left_out), explicit)
    implicit = _weighed(implicit, trusted)
    report = _report(likelihoods, behaviours, implicit, trusted)
    return capped([*explicit, *implicit], settings.max_user_share), report


def signal_votes(behaviours: Iterable[Behaviour], likelihoods: Likelihoods, left_out: Counter[str]) -> list[Vote]:
    """Votes by what one user did with different answers to one prompt. People differ in how much they copy and read, so
    no user's behaviour is compared with another's. Of n answers each pair counts 1 / (n − 1), n / 2 in all."""
    groups: dict[tuple[str, str], list[Behaviour]] = defaultdict(list)
    for one in behaviours:
        if one.user is None:
            left_out["signals of nobody known on an answer"] += 1
        else:
            groups[one.user, one.key].append(one)
    found = []
    for group in groups.values():
        if len(group) == 1:
            left_out["signals on the only answer that a user reacted to of its prompt"] += 1
        for first, second in combinations(group, 2):
            log_odds = likelihoods.score(first.values) - likelihoods.score(second.values)
            if not log_odds:
                left_out["equal signals on two answers"] += 1
                continue
            better, worse = (first, second) if log_odds > 0 else (second, first)
            sure = float(np.tanh(abs(log_odds) / 2))  # 2σ(x) − 1
            found += [replace(vote, weight=sure / (len(group) - 1)) for vote in _as_vote(better, worse, left_out)]
    return found


def _as_vote(better: Behaviour, worse: Behaviour, left_out: Counter[str]) -> list[Vote]:
    """The vote, read as an explicit one would be; none if the texts cannot be fitted on."""
    answers = (better.answer, worse.answer)
    pair = Stored(0, "", 0.0, "", "", better.user, "pair", {"better": "a"}, None, "", answers, [better.user] * 2)
    return votes_of([pair], VoteRules(), left_out)


def _without_repeats(implicit: Sequence[Vote], explicit: Sequence[Vote]) -> list[Vote]:
    """The votes of signals, less those on texts that the same user has said something about."""
    judged = {_texts(vote) for vote in explicit}
    return [vote for vote in implicit if _texts(vote) not in judged]


def _texts(vote: Vote) -> tuple[str | None, str, frozenset[str]]:
    return vote.user, vote.key, frozenset({vote.chosen.completion, vote.rejected.completion})


def _weighed(votes: Sequence[Vote], weights: Mapping[str, float]) -> list[Vote]:
    found = [replace(vote, weight=vote.weight * weights.get(str(vote.user), 1.0)) for vote in votes]
    return [vote for vote in found if vote.weight]


def _trusted(stored: Sequence[Stored], weights: Mapping[str, float], left_out: Counter[str]) -> list[Stored]:
    """What was said, without thumbs and ratings of users who hardly count: a pair of two users' thumbs has no user."""
    found = []
    for one in stored:
        if one.kind == "signal":
            continue
        if one.kind in ("thumb", "rating") and one.user is not None and weights.get(one.user, 1.0) < MIN_WEIGHT:
            left_out["a thumb or a rating of a user who hardly counts"] += 1
            continue
        found.append(one)
    return found


def _held_out(one: Stored, fraction: float) -> bool:
    key = key_of(one.answers[0])
    return key is not None and is_held_out(key, fraction)


def _report(
    likelihoods: Likelihoods, behaviours: Sequence[Behaviour], votes: Sequence[Vote], weights: Mapping[str, float]
) -> BehaviourReport:
    lowest = sorted(weights.items(), key=lambda one: (one[1], one[0]))[:10]
    return {
        "log_odds": {
            name: (value, error)
            for name, value, error in zip(SIGNALS, likelihoods.log_odds, likelihoods.errors, strict=True)
        },
        "judgements": likelihoods.judgements,
        "calibration": likelihoods.calibration,
        "behaviours": len(behaviours),
        "signal_votes": len(votes),
        "users": len(weights),
        "doubted": sum(weight < 0.5 for weight in weights.values()),
        "lowest": dict(lowest),
    }
