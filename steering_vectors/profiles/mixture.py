"""Mixtures: profiles with strengths, the shifts they add up to, and their safe range."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from steering_vectors.errors import SteeringError
from steering_vectors.profiles.metadata import range_text
from steering_vectors.profiles.profile import CHOICES, LARGEST, ApplyTo, Profile

ROUNDING = 1e-9  # relative; tolerance for float rounding in the sum of strengths
MAX_LAYER_SUBSETS = 16  # of one profile whose unit shifts are kept


@dataclass(frozen=True, slots=True, eq=False)
class Shifts:
    """Vectors to add to the residual stream: `rows` float32 `[blocks, hidden]`, one per block in `layers`, ascending.
    `bound` is an upper bound of the entries' magnitude. `zero_layers` is known for the shifts of one unit only."""

    layers: tuple[int, ...]
    rows: torch.Tensor
    bound: float = math.inf
    zero_layers: tuple[int, ...] = ()

    def by_layer(self) -> dict[int, torch.Tensor]:
        return dict(zip(self.layers, self.rows, strict=True))


_UNIT_SHIFTS: WeakKeyDictionary[Profile, dict[tuple[int, ...] | None, Shifts]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """One profile of a mixture, with its strength α and optionally a subset of its layers.

    Raises SteeringError for a strength that is not finite, for an ablation strength outside 0 to 1, and for layers that
    the profile does not have.
    """

    profile: Profile
    strength: float
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise SteeringError(f"the strength of {self.profile.name!r} must be a finite number", param="strength")
        if self.profile.operator == "ablate" and not 0 <= self.strength <= 1:
            raise SteeringError(
                f"profile {self.profile.name!r} ablates its direction: its strength must be from 0 to 1, "
                f"not {self.strength:g}",
                param="strength",
            )
        unit = unit_shifts(self.profile, self.layers)
        if self.profile.operator == "ablate" and unit.zero_layers:
            raise SteeringError(
                f"profile {self.profile.name!r} cannot be ablated: its direction at layer {unit.zero_layers[0]} is zero"
            )

    @property
    def active_layers(self) -> tuple[int, ...]:
        return self.profile.layers if self.layers is None else tuple(sorted(set(self.layers)))

    def shift(self) -> Shifts:
        """α · unit · direction at each active block, float32."""
        unit = unit_shifts(self.profile, self.layers)
        coefficient = self.strength * self.profile.unit
        bound = unit.bound * abs(coefficient) if abs(coefficient) <= LARGEST else math.inf
        return Shifts(unit.layers, unit.rows * coefficient, bound)


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """A mixture of terms. Without terms, the model is unsteered. Profiles in `closed_gates` have no effect.

    Raises SteeringError if a profile occurs twice, and for strengths beyond the safe range unless that is allowed.
    """

    terms: tuple[Term, ...] = ()
    apply_to: ApplyTo = "generated"
    preserve_norm: bool = False
    allow_beyond_safe: bool = False
    closed_gates: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.apply_to not in CHOICES["apply_to"]:
            raise SteeringError(f"apply_to is {self.apply_to!r}, not one of generated, all", param="apply_to")
        names = [term.profile.name for term in self.terms]
        for name in names if len(set(names)) < len(names) else ():
            if names.count(name) > 1:
                raise SteeringError(f"profile {name!r} occurs twice in one steering", param="terms")
        if self.apply_to == "all" and self.gated:
            raise SteeringError(
                f"profile {self.gated[0].profile.name!r} has a gate, which reads the prompt, so it cannot steer the "
                "prompt itself; leave apply_to out or set it to generated",
                param="apply_to",
            )
        if not self.allow_beyond_safe:
            self._check_safe_range()

    @property
    def gated(self) -> list[Term]:
        """The terms whose profile has a gate."""
        return [term for term in self.terms if term.profile.gate is not None and term.strength != 0]

    @property
    def is_neutral(self) -> bool:
        """True if the mixture changes no position."""
        return all(self.is_idle(term) for term in self.terms)

    def is_idle(self, term: Term) -> bool:
        """Whether a term does nothing: its strength is 0, or its gate closed."""
        return term.strength == 0 or term.profile.name in self.closed_gates

    def shifts(self) -> Shifts:
        """The sum of the additive terms, at the blocks that they shift.

        An overflow gives an infinite entry, which the bank refuses.
        """
        terms = self._active("add")
        if len(terms) == 1:
            return terms[0].shift()
        parts = [term.shift() for term in terms]
        layers = tuple(sorted({layer for part in parts for layer in part.layers}))
        total = torch.zeros(len(layers), terms[0].profile.model.hidden_size if terms else 0)
        for part in parts:
            total[[layers.index(layer) for layer in part.layers]] += part.rows
        return Shifts(layers, total, sum(part.bound for part in parts))

    def scaled(self) -> tuple[Shifts, float] | None:
        """The unit shifts and the coefficient of a mixture that adds a single profile; None for any other mixture."""
        if len(self.terms) != 1 or self.terms[0].profile.operator != "add" or self.is_neutral:
            return None
        (term,) = self.terms
        return unit_shifts(term.profile, term.layers), term.strength * term.profile.unit

    def ablations(self) -> dict[int, list[tuple[float, torch.Tensor]]]:
        """(β, unit vector `[hidden]`) pairs per block, in the order of the terms."""
        pairs: dict[int, list[tuple[float, torch.Tensor]]] = {}
        for term in self._active("ablate"):
            for layer, direction in term.profile.injected(term.layers).items():
                pairs.setdefault(layer, []).append((term.strength, direction / direction.norm()))
        return pairs

    def digest(self) -> str:
        """A hash of the change at a steered position. Equal digests mean equal changes; it is empty for no change."""
        if self.is_neutral:
            return ""
        content = [
            (term.profile.version or term.profile.content_digest(), float(term.strength), term.active_layers)
            for term in self.terms
            if not self.is_idle(term)
        ]
        return hashlib.sha256(repr((content, self.preserve_norm)).encode()).hexdigest()

    def is_calibrated(self, term: Term) -> bool:
        """Whether the KL budget holds for this use: the profile alone, at all its layers, as it was calibrated."""
        return (
            bool(term.profile.calibration)
            and not term.profile.calibration.get("unreached", False)
            and all(other is term or self.is_idle(other) for other in self.terms)
            and term.active_layers == term.profile.layers
            and self.apply_to == "generated"
            and not self.preserve_norm
        )

    def _active(self, operator: str) -> list[Term]:
        return [term for term in self.terms if not self.is_idle(term) and term.profile.operator == operator]

    def _check_safe_range(self) -> None:
        remedy = "set allow_beyond_safe to true to go beyond it"
        for term in self.terms:
            if abs(term.strength) > term.profile.safe_limit(term.strength):
                raise SteeringError(
                    f"strength {term.strength:g} of profile {term.profile.name!r} is beyond its safe range of "
                    f"{range_text(term.profile.safe_range)}; {remedy}",
                    param="strength",
                    code="strength_out_of_range",
                )
        added = [term for term in self.terms if term.strength != 0 and term.profile.operator == "add"]
        total = sum(abs(term.strength) for term in added)
        limit = min((term.profile.safe_limit(term.strength) for term in added), default=math.inf)
        if total > limit * (1 + ROUNDING):
            raise SteeringError(
                f"the strengths of this mix add up to {total:g}, beyond the safe range of {limit:g}; {remedy}",
                param="terms",
                code="strength_out_of_range",
            )


def unit_shifts(profile: Profile, layers: tuple[int, ...] | None) -> Shifts:
    """What one unit of strength injects, before `unit`. Kept as long as the profile, since strengths change at every
    step. Raises SteeringError for a layer that the profile lacks."""
    layers = None if layers is None else tuple(sorted(set(layers)))  # one key for each set of blocks
    kept = _UNIT_SHIFTS.setdefault(profile, {})
    found = kept.get(layers)
    if found is None:
        injected = profile.injected(layers)
        rows = torch.stack(list(injected.values()))
        zero = tuple(layer for layer, direction in injected.items() if not direction.any())
        found = Shifts(tuple(injected), rows, float(rows.abs().max()), zero)
        if len(kept) >= MAX_LAYER_SUBSETS:
            kept.clear()
        kept[layers] = found
    return found
