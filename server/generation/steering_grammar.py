"""What a request says about steering, before its profiles are looked up.

Owns the grammar of steering strings (`warm@0.8+concise@-0.3`), the aliases of a model, and the step from names to a
mixture. Knows nothing of HTTP, files or engines; profiles come from whoever can find them by name.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from steering_vectors.errors import SteeringError, UnknownModel
from steering_vectors.profiles.mixture import Mixture, Term
from steering_vectors.profiles.profile import ApplyTo, Profile

TERM = re.compile(
    r"(?P<name>[a-z0-9][a-z0-9._-]{0,63}(?:#[0-9a-f]{8,64})?)"
    r"(?:@(?P<strength>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?))?"
)
EXAMPLE = "warm@0.8+concise@-0.3"
HEADER = "x-trimtab-steering"
LONGEST_SCHEDULE = 4096


@dataclass(frozen=True, slots=True)
class Schedule:
    """Strengths from tokens of the completion on, ascending from token 0; in steps, or with straight lines between."""

    points: tuple[tuple[int, float], ...]
    linear: bool = False

    def __post_init__(self) -> None:
        tokens = [token for token, _ in self.points]
        if not tokens or tokens[0] != 0:
            raise SteeringError("a schedule begins with the strength from token 0", param="steering.schedule")
        if any(later <= earlier for earlier, later in pairwise(tokens)):
            raise SteeringError("a schedule's tokens must rise from point to point", param="steering.schedule")
        if tokens[-1] > LONGEST_SCHEDULE:
            raise SteeringError(f"a schedule ends by token {LONGEST_SCHEDULE}", param="steering.schedule")

    def at(self, token: int) -> float:
        """The strength at a token; after the last point it stays."""
        place = bisect_right(self.points, token, key=lambda point: point[0]) - 1
        start, strength = self.points[place]
        if not self.linear or place + 1 == len(self.points):
            return strength
        end, later = self.points[place + 1]
        return strength + (later - strength) * (token - start) / (end - start)

    def changes(self) -> list[int]:
        """The tokens at which the strength may differ from the one before."""
        tokens = [token for token, _ in self.points]
        return list(range(tokens[-1] + 1)) if self.linear else tokens


@dataclass(frozen=True, slots=True)
class WantedTerm:
    """A profile by name, or by name and version (`NAME#SHA8`), at a strength; `layers` None means all it has."""

    reference: str
    strength: float = 1.0
    layers: tuple[int, ...] | None = None
    schedule: Schedule | None = None

    def at(self, token: int) -> float:
        """The strength under which a token of the completion is drawn."""
        return self.strength if self.schedule is None else self.schedule.at(token)


@dataclass(frozen=True, slots=True)
class WantedSteering:
    """A mix by names. The default asks for nothing."""

    terms: tuple[WantedTerm, ...] = ()
    apply_to: ApplyTo = "generated"
    preserve_norm: bool = False
    allow_beyond_safe: bool = False

    def resolve(self, find: Callable[[str], Profile]) -> Mixture:
        """The mix at the start. Raises UnknownProfile, or SteeringError for a mix that is not allowed."""
        return self.timeline(find)[0][1]

    def timeline(self, find: Callable[[str], Profile]) -> list[tuple[int, Mixture]]:
        """The mixes, each from a token of the completion on, the first from token 0. Raises as `resolve` does."""
        profiles = [find(term.reference) for term in self.terms]
        scheduled = (term.schedule.changes() for term in self.terms if term.schedule is not None)
        tokens = sorted({0}.union(*scheduled))
        return [(token, self._mixture(profiles, token)) for token in tokens]

    def _mixture(self, profiles: Sequence[Profile], token: int) -> Mixture:
        pairs = zip(self.terms, profiles, strict=True)
        return Mixture(
            terms=tuple(Term(profile, term.at(token), term.layers) for term, profile in pairs),
            apply_to=self.apply_to,
            preserve_norm=self.preserve_norm,
            allow_beyond_safe=self.allow_beyond_safe,
        )


def parse_steering(text: str) -> tuple[WantedTerm, ...]:
    """Read `term (+ term)*` with `term = name [@ signed decimal]`; a name alone means strength 1.

    Raises SteeringError that shows the part it could not read, for a name that occurs twice, and for a strength that
    is not finite.
    """
    terms: list[WantedTerm] = []
    position = 0
    while True:
        match = TERM.match(text, position)
        end = match.end() if match else position
        if match is None or (end < len(text) and text[end] != "+"):
            raise SteeringError(_unreadable(text, position), param="steering")
        terms.append(_term(match))
        if end == len(text):
            break
        position = end + 1
    _refuse_duplicates(terms)
    return tuple(terms)


def refuse_two(*said: str | None) -> None:
    """Raise SteeringError if more than one part of a request steers; each is named, or None if it does not."""
    given = [one for one in said if one is not None]
    if len(given) > 1:
        raise SteeringError(f"both {given[0]} and {given[1]} steer: use only one of them", param="steering")


def split_model(model: str, served: str) -> str | None:
    """The steering string in a model's name: None for the served model itself, the rest for `SERVED:rest`.

    Raises UnknownModel for any other name.
    """
    if model == served:
        return None
    if model.startswith(f"{served}:"):
        return model[len(served) + 1 :]
    raise UnknownModel(
        f"model {model!r} is not served; this server has {served!r} and, steered, '{served}:PROFILE@STRENGTH'",
        param="model",
    )


def _term(match: re.Match[str]) -> WantedTerm:
    strength = float(match["strength"] or 1)
    if not math.isfinite(strength):
        raise SteeringError(f"the strength {match['strength']} of {match['name']!r} is not finite", param="steering")
    return WantedTerm(match["name"], strength)


def _refuse_duplicates(terms: list[WantedTerm]) -> None:
    names = [term.reference.partition("#")[0] for term in terms]
    for name in names:
        if names.count(name) > 1:
            raise SteeringError(f"profile {name!r} occurs twice in one steering", param="steering")


def _unreadable(text: str, position: int) -> str:
    if not text:
        return f"the steering is empty; write for example {EXAMPLE!r}, or leave it out"
    return f"steering {text!r} cannot be read at {text[position:]!r}; write for example {EXAMPLE!r}"
