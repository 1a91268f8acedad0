"""Steering plans with their profiles: what holds at each token, and what the receipt says of it.

A plan's schedules are evaluated here, one mixture when its token is due.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
import torch

from server.engines.protocol import (
    AppliedTerm,
    BlockEffect,
    GateDecision,
    PlanEffect,
    PlanTerm,
    Segment,
    SteeringPlan,
    TermEffect,
)
from steering_vectors.errors import SteeringError
from steering_vectors.profiles.gate import Gate
from steering_vectors.profiles.mixture import ROUNDING, Mixture, Term, unit_shifts
from steering_vectors.profiles.profile import LARGEST, Profile
from steering_vectors.steering.bank import shifts_in

Strengths = np.ndarray[tuple[int, int], np.dtype[np.float64]]  # [terms, tokens]

MAX_CACHED_MIXTURES = 64
MAX_EXACT_CHECKS = 16  # tokens of one schedule whose shifts are computed to see whether they overflow


@dataclass(frozen=True, slots=True, eq=False)
class Steering:
    """What steers a row at one token: the mixture, its digest, and for each term whether it acts and whether it is used
    as it was calibrated."""

    mixture: Mixture
    digest: str
    acts: tuple[bool, ...]
    calibrated: tuple[bool, ...]


class ResolvedPlan:
    """A plan with the profile of each of its terms."""

    def __init__(self, plan: SteeringPlan, profiles: Mapping[str, Profile]) -> None:
        self.plan = plan
        self.profiles = tuple(profiles[term.version] for term in plan.terms)
        self._gated = frozenset(profile.name for profile in self.profiles if profile.gate is not None)
        self._cache: dict[tuple[tuple[float, ...], frozenset[str]], Steering] = {}

    @property
    def gates(self) -> dict[str, Gate]:
        """By profile, the gates of the terms that ever have a strength."""
        pairs = zip(self.plan.terms, self.profiles, strict=True)
        return {profile.name: profile.gate for term, profile in pairs if profile.gate and term.acts}

    def at(self, token: int, opened: frozenset[str] = frozenset()) -> Steering:
        """What holds at a token; profiles whose gate is not among the opened ones do nothing."""
        strengths = self.plan.strengths(token)
        closed = self._gated - opened
        key = (strengths, closed)
        found = self._cache.get(key)
        if found is None:
            if len(self._cache) >= MAX_CACHED_MIXTURES:
                self._cache.clear()
            # the safe range was checked when the plan was accepted
            mixture = self._mixture(strengths, allow_beyond_safe=True, closed=closed)
            acts = tuple(not mixture.is_idle(term) for term in mixture.terms)
            calibrated = tuple(mixture.is_calibrated(term) for term in mixture.terms)
            found = self._cache[key] = Steering(mixture, mixture.digest(), acts, calibrated)
        return found

    def check(self, dtype: torch.dtype) -> None:
        """Raise SteeringError for strengths, layers or shifts that the profiles or the dtype do not allow.

        Strengths are looked at where they can be largest: at the points of the schedules and right beside them.
        """
        # between two points all strengths are straight, so that sums of their sizes are largest at the ends, and which
        # terms act only changes at a point; the end of the safe range that counts changes where a strength crosses 0
        lines = [term.schedule.points for term in self.plan.terms if term.schedule]
        points = {token for line in lines for token, _ in line}
        for (start, one), (end, other) in chain.from_iterable(map(pairwise, lines)):
            if one * other < 0:
                points.add(int(start + (end - start) * one / (one - other)))
        tokens = {0, *(max(0, point + offset) for point in points for offset in (-1, 0, 1))}
        found = [self.plan.strengths(token) for token in sorted(tokens)]
        strengths: Strengths = np.array(found).T
        suspects = {0, *strengths.argmin(1).tolist(), *strengths.argmax(1).tolist()}
        if not self.plan.allow_beyond_safe:
            suspects.update(self._beyond_the_sum(strengths))
        for place in sorted(suspects):
            self._mixture(found[place], allow_beyond_safe=self.plan.allow_beyond_safe)
        # no shift is larger than the sum of the terms' largest entries; where that is too large, the shift is computed
        bounds = self._bounds(strengths)
        places = [int(place) for place in np.argsort(-bounds) if not bounds[place] <= torch.finfo(dtype).max]
        for place in places[:MAX_EXACT_CHECKS]:
            shifts_in(self._mixture(found[place], allow_beyond_safe=True), dtype)
        if len(places) > MAX_EXACT_CHECKS:
            raise SteeringError("the shift overflows the model's dtype: use a smaller strength", param="strength")

    def effect(self, dtype: torch.dtype) -> PlanEffect:
        """What the plan does at its first token."""
        steering = self.at(0, frozenset(self.gates))
        pairs = zip(self.plan.terms, self.profiles, steering.calibrated, strict=True)
        terms = [
            TermEffect(
                applied(term, profile, calibrated),
                profile.method,
                profile.unit,
                profile.safe_range,
                profile.calibration.get("kl_at_1"),
            )
            for term, profile, calibrated in pairs
        ]
        blocks = []
        for layer, shift in shifts_in(steering.mixture, dtype).by_layer().items():
            usual = next((norm for profile in self.profiles if (norm := profile.residual_norms.get(layer))), None)
            norm = float(shift.double().norm())  # the squares of finite entries may overflow in the model's dtype
            blocks.append(BlockEffect(layer, norm, usual))
        return PlanEffect(tuple(terms), tuple(blocks))

    def _mixture(
        self, strengths: tuple[float, ...], *, allow_beyond_safe: bool, closed: frozenset[str] = frozenset()
    ) -> Mixture:
        parts = zip(self.plan.terms, self.profiles, strengths, strict=True)
        return Mixture(
            tuple([Term(profile, strength, term.layers) for term, profile, strength in parts]),
            self.plan.apply_to,
            self.plan.preserve_norm,
            allow_beyond_safe,
            closed,
        )

    def _beyond_the_sum(self, strengths: Strengths) -> list[int]:
        """The first place at which the strengths add up to more than the safe range of a profile that acts there."""
        adding = [place for place, profile in enumerate(self.profiles) if profile.operator == "add"]
        if not adding:
            return []
        sizes = np.abs(strengths[adding])
        lows, highs = np.array([self.profiles[place].safe_range for place in adding]).T[:, :, None]
        limits = np.where(strengths[adding] < 0, -lows, highs)
        least = np.where(sizes > 0, limits, np.inf).min(0)
        return [int(place) for place in np.flatnonzero(sizes.sum(0) > least * (1 + ROUNDING))[:1]]

    def _bounds(self, strengths: Strengths) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """A bound on the size of any shift's entries at each place."""
        bounds = np.zeros(strengths.shape[1])
        with np.errstate(over="ignore"):
            for row, term, profile in zip(strengths, self.plan.terms, self.profiles, strict=True):
                if profile.operator == "add":
                    sizes = np.abs(row) * profile.unit
                    bounds += np.where(sizes > LARGEST, np.inf, sizes * unit_shifts(profile, term.layers).bound)
        return bounds


class SteeringState:
    """How one choice is steered: what holds now, from which position on, and what its receipt says.

    `generated_from` is the position from which generated tokens are steered: the last token of the prompt.
    """

    def __init__(self, plan: ResolvedPlan, *, generated_from: int, gates_stay_closed: bool = False) -> None:
        self.plan = plan
        self.conditions = plan.gates
        self.gates: dict[str, GateDecision] = {}
        if gates_stay_closed:
            self.gates = dict.fromkeys(self.conditions, GateDecision(None, False))
        self.steered_tokens = 0
        self.next_change: int | None = None  # the token of the completion at which a schedule changes a strength
        self._generated_from = generated_from
        self._ended: list[Segment] = []
        self._begin(0, plan)

    @property
    def undecided(self) -> dict[str, Gate]:
        """The gates, by profile, that the prompt has yet to decide."""
        return {name: gate for name, gate in self.conditions.items() if name not in self.gates}

    @property
    def mixture(self) -> Mixture:
        """What steers the next position."""
        return self._now.mixture

    @property
    def digest(self) -> str:
        """Names what is done to a steered position; empty for the untouched model."""
        return self._now.digest

    @property
    def steered_from(self) -> int | None:
        """The first position at which the mixture holds; None for the untouched model. Positions that were computed
        before the mixture changed stay."""
        if not self._now.digest:
            return None
        return 0 if self.plan.plan.apply_to == "all" else self._generated_from

    @property
    def segments(self) -> tuple[Segment, ...]:
        return (*self._ended, self._segment())

    def change(self, token: int, plan: ResolvedPlan) -> Segment:
        """Steer by another plan from this token of the completion on."""
        if self._from_token != token or self._positions:
            self._ended.append(self._segment())
        self._begin(token, plan)
        return self._segment()

    def advance(self, token: int) -> bool:
        """Go on to a token of the completion; whether that changes the mixture."""
        if self.next_change is None or token < self.next_change:
            return False
        self._hold(token)
        return True

    def decide(self, token: int, gates: Mapping[str, GateDecision]) -> None:
        self.gates.update(gates)
        self.change(token, self.plan)

    def count(self, positions: int) -> None:
        """Note that this many positions were computed under what holds now, where it steers."""
        if not positions:
            return
        self._positions += positions
        self.steered_tokens += positions
        for place, acts in enumerate(self._now.acts):
            self._steered[place] += positions * acts

    def _begin(self, token: int, plan: ResolvedPlan) -> None:
        self.plan = plan
        self._from_token = token
        self._positions = 0
        self._steered = [0] * len(plan.profiles)
        self._calibrated = [True] * len(plan.profiles)
        self._hold(token)

    def _hold(self, token: int) -> None:
        place = token - self._from_token
        self._now = self.plan.at(place, frozenset(name for name, gate in self.gates.items() if gate.opened))
        later = self.plan.plan.next_change(place)
        self.next_change = None if later is None else self._from_token + later
        for index, calibrated in enumerate(self._now.calibrated):
            self._calibrated[index] = self._calibrated[index] and calibrated

    def _segment(self) -> Segment:
        parts = zip(self.plan.plan.terms, self.plan.profiles, self._calibrated, self._steered, strict=True)
        closed = {name for name in self.conditions if name not in self.gates or not self.gates[name].opened}
        terms = [
            applied(term, profile, calibrated, steered, closed=profile.name in closed)
            for term, profile, calibrated, steered in parts
        ]
        return Segment(self._from_token, self.plan.plan, tuple(terms))


def applied(
    term: PlanTerm, profile: Profile, calibrated: bool, steered: int = 0, *, closed: bool = False
) -> AppliedTerm:
    acts = term.acts and not closed
    layers = profile.layers if term.layers is None else tuple(sorted(set(term.layers)))
    return AppliedTerm(term, profile.operator, layers if acts else (), calibrated, steered, closed)
