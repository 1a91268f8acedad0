"""Steering in a request: the grammar of steering strings (`warm@0.8+concise@-0.3`), model aliases, and which of
several sources steers.

A plan has the names of a request, `NAME`, `NAME#SHA8` or `NAME#ALIAS`, until `pinned` replaces them by the versions
that are served.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from server.engines.errors import UnknownModel
from server.engines.protocol import ApplyTo, PlanTerm, SteeringPlan
from steering_vectors.errors import SteeringError

if TYPE_CHECKING:
    from steering_vectors.profiles.profile import Profile

TERM = re.compile(
    r"(?P<name>[a-z0-9][a-z0-9._-]{0,63}(?:#(?:[0-9a-f]{8,64}|[a-z][a-z0-9_-]{0,31})(?![a-z0-9_-]))?)"
    r"(?:@(?P<strength>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?))?"
)
EXAMPLE = "warm@0.8+concise@-0.3"
HEADER = "x-trimtab-steering"
MAX_STEERING_CHARACTERS = 4096
MAX_TERMS = 64
MAX_SHOWN = 80  # characters of a text in an error


def parse_steering(text: str, apply_to: ApplyTo = "generated") -> SteeringPlan:
    """Read `term (+ term)*` with `term = name [# version or alias] [@ signed decimal]`; a name alone means strength 1.

    Raises SteeringError that shows the part it could not read, for a name that occurs twice, for a strength that is not
    finite, and for more than 4096 characters or 64 profiles.
    """
    if len(text) > MAX_STEERING_CHARACTERS:
        raise SteeringError(
            f"the steering has {len(text)} characters; at most {MAX_STEERING_CHARACTERS} are read", param="steering"
        )
    terms: list[PlanTerm] = []
    position = 0
    while True:
        match = TERM.match(text, position)
        end = match.end() if match else position
        if match is None or (end < len(text) and text[end] != "+"):
            problem = (
                f"steering {shown(text)} cannot be read at {shown(text[position:])}"
                if text
                else "the steering is empty"
            )
            remedy = f"write for example {EXAMPLE!r}{'' if text else ', or leave it out'}"
            raise SteeringError(f"{problem}; {remedy}", param="steering")
        if len(terms) == MAX_TERMS:
            raise SteeringError(f"the steering has more than {MAX_TERMS} profiles: use fewer", param="steering")
        terms.append(PlanTerm(match["name"], "", float(match["strength"] or 1)))
        if end == len(text):
            return SteeringPlan(tuple(terms), apply_to)
        position = end + 1


def shown(text: str) -> str:
    """A text as errors show it."""
    return repr(text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…")


def pinned(plan: SteeringPlan, find: Callable[[str], Profile]) -> SteeringPlan:
    """The plan with the names and versions of the profiles that are served now. Raises UnknownProfile, and
    SteeringError for a profile that occurs twice."""
    profiles = [find(term.profile) for term in plan.terms]
    pairs = zip(plan.terms, profiles, strict=True)
    return replace(plan, terms=tuple(replace(term, profile=found.name, version=found.version) for term, found in pairs))


def only_one(
    fields: Mapping[str, SteeringPlan | None], header: str | None, apply_to: ApplyTo = "generated"
) -> SteeringPlan:
    """The one plan that a request has, from its fields, named as in errors, or its header; without any, the default.
    Raises SteeringError for two."""
    sources = {**fields, f"the header {HEADER}": None if header is None else parse_steering(header, apply_to)}
    given = {name: plan for name, plan in sources.items() if plan is not None}
    if len(given) > 1:
        first, second, *_ = given
        raise SteeringError(f"both {first} and {second} steer: use only one of them", param="steering")
    return next(iter(given.values()), SteeringPlan())


def of_alias(model: str, served: str, apply_to: ApplyTo = "generated") -> SteeringPlan | None:
    """The steering of a model alias, `SERVED:steering`; None for the served model itself.

    Raises UnknownModel for any other name.
    """
    if model == served:
        return None
    if model.startswith(f"{served}:"):
        return parse_steering(model[len(served) + 1 :], apply_to)
    raise UnknownModel(
        f"model {shown(model)} is not served; this server has {served!r} and, steered, '{served}:PROFILE@STRENGTH'",
        param="model",
    )
