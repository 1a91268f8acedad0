"""Two versions of a profile under equal conditions: held-out votes, what steering costs, and trust."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit
from typing_extensions import TypedDict

from server.learning.paired_bootstrap import Difference, paired_mean
from steering_vectors.data.batches import Encoded
from steering_vectors.data.corpus import Sides
from steering_vectors.evaluation.trust.figures import Figure, Vertical, compare
from steering_vectors.fitting.calibration import SAMPLED_TOKENS
from steering_vectors.measures.curve import CurvePoint, measure_points
from steering_vectors.measures.propensity import propensity
from steering_vectors.measures.steered_model import SteeredModel
from steering_vectors.profiles.profile import Profile
from steering_vectors.progress import Progress

TEXTS = 64  # whose cost is measured


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Pairs that no fit has seen, encoded, with the key of each one's prompt, and how much each counts."""

    pairs: tuple[tuple[Encoded, Encoded], ...]
    keys: tuple[str, ...]
    weights: tuple[float, ...]

    @property
    def sides(self) -> Sides:
        return Sides(tuple(one for one, _ in self.pairs), tuple(other for _, other in self.pairs), True)


class TrustChange(TypedDict):
    """The main figure of a vertical under both versions; `harm` is the change for the worse."""

    measure: str
    baseline: float
    candidate: float
    change_95: tuple[float, float]
    harm: float


@dataclass(frozen=True, slots=True)
class Compared:
    """`votes` is by how much the candidate wins held-out votes over the baseline: the mean of σ(Δ/√T) − ½, where Δ is
    the difference of the rewards of the chosen and the rejected answer, and T the number of their tokens. `nats` is the
    mean of Δ itself, and `base` the same on held-out rows of the base data, if there are any. Costs are those at the
    strength compared.

    The reward of an answer is log P(candidate) − log P(baseline), as in direct preference optimization
    (arXiv:2305.18290). Its noise grows as √T, and σ is bounded, so a few long answers do not decide. An answer that the
    baseline wrote becomes less likely under any other version, by the same amount per token whatever the version
    prefers. This drift, the mean over all tokens of the answers, is taken off; else every candidate would please who
    likes short answers. For votes at random the mean is ½.
    """

    votes: Difference
    nats: Difference
    base: Difference | None
    candidate: CurvePoint
    baseline: CurvePoint
    trust: dict[str, TrustChange]


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Measures two versions at one strength, on the same votes, prompts and random numbers."""

    steered: SteeredModel
    votes: HeldOut
    base: HeldOut | None
    prompts: Sequence[Sequence[int]]
    verticals: Sequence[Vertical]
    strength: float
    seed: int
    confidence: float = 0.95
    progress: Progress | None = None

    def of(self, candidate: Profile, baseline: Profile) -> Compared:
        changes = self._changes(candidate, baseline, self.votes)
        won = expit(changes / np.sqrt(sum(_tokens(self.votes)))) - 0.5
        votes, nats = (self._mean(values, self.votes) for values in (won, changes))
        self._report(1)
        base = None
        if self.base is not None:
            base = self._mean(self._changes(candidate, baseline, self.base), self.base)
        self._report(2)
        costs = [self._cost(one) for one in (candidate, baseline)]
        self._report(3)
        trust = {}
        for number, vertical in enumerate(self.verticals, start=4):
            trust[vertical.name] = self._trust(vertical, candidate, baseline)
            self._report(number)
        return Compared(votes, nats, base, costs[0], costs[1], trust)

    def _changes(self, candidate: Profile, baseline: Profile, held_out: HeldOut) -> np.ndarray:
        """Δ of each pair, in nats: float64 `[pairs]`."""
        sides = held_out.sides
        found = []
        for profile in (candidate, baseline):
            self.steered.write(profile, self.strength)
            found.append(propensity(self.steered, sides, steer=True))
        new, old = found
        return without_drift(
            (new.positives - old.positives).numpy(),
            (new.negatives - old.negatives).numpy(),
            *_tokens(held_out),
        )

    def _mean(self, values: np.ndarray, held_out: HeldOut) -> Difference:
        return paired_mean(values, held_out.keys, weights=held_out.weights, confidence=self.confidence, seed=self.seed)

    def _cost(self, profile: Profile) -> CurvePoint:
        prompts = [self.prompts[place % len(self.prompts)] for place in range(TEXTS)]
        (point,) = measure_points(
            self.steered, profile, [self.strength], prompts, tokens=SAMPLED_TOKENS, seed=self.seed
        )
        return point

    def _trust(self, vertical: Vertical, candidate: Profile, baseline: Profile) -> TrustChange:
        seen = []
        for profile in (baseline, candidate):
            self.steered.write(profile, self.strength)
            seen.append(vertical.read(self.steered))
        figure = vertical.figures[0]
        old, new = figure.value(seen[0]), figure.value(seen[1])
        change = compare(figure, {0.0: seen[0], 1.0: seen[1]})[1.0]
        return {
            "measure": figure.text,
            "baseline": old,
            "candidate": new,
            "change_95": change["delta_95"],
            "harm": harm(figure, old, new),
        }

    def _report(self, done: int) -> None:
        if self.progress is not None:
            self.progress("compare", done, 3 + len(self.verticals))


def _tokens(held_out: HeldOut) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of tokens of chosen and of rejected answers, `[pairs]` each."""
    sides = held_out.sides
    chosen, rejected = (
        np.array([len(ids) - start for ids, start in side]) for side in (sides.positives, sides.negatives)
    )
    return chosen, rejected


def without_drift(
    chosen: np.ndarray, rejected: np.ndarray, chosen_tokens: np.ndarray, rejected_tokens: np.ndarray
) -> np.ndarray:
    """Rewards of chosen less those of rejected answers, in nats, without what comes from their lengths alone: float64
    `[pairs]`. Rewards are changes of log-likelihoods, and their mean per token over all answers is the drift."""
    drift = (chosen.sum() + rejected.sum()) / max(chosen_tokens.sum() + rejected_tokens.sum(), 1)
    differences: np.ndarray = chosen - rejected - drift * (chosen_tokens - rejected_tokens)
    return differences


def harm(figure: Figure, old: float, new: float) -> float:
    """By how much a figure became worse; negative if it became better."""
    if figure.aim == "half":
        return abs(new - 0.5) - abs(old - 0.5)
    return new - old if figure.aim == "lower" else old - new


def prompt_count(held_out: HeldOut) -> int:
    return int(np.unique(held_out.keys).size)
