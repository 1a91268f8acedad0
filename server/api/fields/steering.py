"""The `steering` field: a string such as `warm@0.8+concise@-0.3`, or an object with more options."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from server.api.fields.body import FAIL_FAST, Body, Examples, OrElse, Short
from server.engines.protocol import MAX_SCHEDULE_TOKEN, ApplyTo, Interpolation, PlanTerm, SteeringPlan, StrengthSchedule
from server.generation.steering_grammar import EXAMPLE, MAX_TERMS, parse_steering
from steering_vectors.errors import SteeringError

MAX_LAYERS = 1024
ABOUT_USER = (
    "Whom the text is for. All requests of one user get the same version of a profile of which an alias has a share. "
    "If the server keeps generations, this one is deleted with the user's feedback."
)
Layers = Annotated[list[int], Field(max_length=MAX_LAYERS, fail_fast=True)]


class SchedulePointBody(Body):
    """The strength at one token of the completion."""

    from_token: int = Field(ge=0, le=MAX_SCHEDULE_TOKEN, description="The token, from 0; the first point has 0.")
    strength: float = Field(description="The strength: from this token on, or with linear interpolation at this token.")


class SteeringTermBody(Body):
    """One profile of a mix."""

    examples: ClassVar[Examples] = ({"name": "warm", "strength": 0.8},)

    name: Short = Field(description="A served profile, NAME, NAME#SHA8 or NAME#ALIAS.")
    strength: float | None = Field(
        None, description="1 (the default) is the profile's calibrated full strength, 0 none, below 0 the opposite."
    )
    layers: Layers | None = Field(None, description="The blocks to steer, of those the profile has; by default all.")
    schedule: Annotated[list[SchedulePointBody], FAIL_FAST] | None = Field(
        None,
        max_length=64,
        description="A strength that changes during the generation, instead of `strength`. Tokens count from the start "
        "of the completion; in `PATCH /generations/{id}`, from the first token under the change.",
    )
    interpolation: Interpolation | None = Field(
        None, description="`step` (the default) holds each strength until the next point; `linear` interpolates."
    )

    def term(self) -> PlanTerm:
        layers = None if self.layers is None else tuple(self.layers)
        if layers is not None and len(set(layers)) < len(layers):
            raise SteeringError("layers names a block twice: name each once", param="layers")
        if self.schedule is None:
            if self.interpolation is not None:
                raise SteeringError("interpolation is given without schedule", param="steering.interpolation")
            return PlanTerm(self.name, "", 1.0 if self.strength is None else self.strength, layers)
        if self.strength is not None:
            raise SteeringError("strength and schedule are both given: use only one of them", param="schedule")
        points = tuple((point.from_token, point.strength) for point in self.schedule)
        return PlanTerm(self.name, "", layers=layers, schedule=StrengthSchedule(points, self.interpolation or "step"))


class SteeringBody(Body):
    """A mix of profiles, and where it applies."""

    examples: ClassVar[Examples] = (
        {"profiles": [{"name": "warm", "strength": 0.8, "layers": [5]}], "apply_to": "generated"},
    )

    profiles: Annotated[list[SteeringTermBody], FAIL_FAST] = Field(
        max_length=MAX_TERMS, description="The profiles; an empty list is no steering."
    )
    apply_to: ApplyTo = Field("generated", description="From the last prompt token on, or the whole prompt too.")
    preserve_norm: bool = Field(False, description="Preserve the norm of each steered residual.")
    allow_beyond_safe: bool = Field(False, description="Allow strengths beyond the profiles' safe range.")

    def plan(self, default: ApplyTo = "generated") -> SteeringPlan:
        """`default` is used for `apply_to` where it was left out. Raises SteeringError that names protocol fields."""
        apply_to = self.apply_to if "apply_to" in self.model_fields_set else default
        terms = tuple(term.term() for term in self.profiles)
        return SteeringPlan(terms, apply_to, self.preserve_norm, self.allow_beyond_safe)


def _read_string(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        plan = parse_steering(value)
    except SteeringError as error:
        raise PydanticCustomError(error.code, "{reason}", {"reason": error.message}) from error
    return {"profiles": [{"name": term.profile, "strength": term.strength} for term in plan.terms]}


Steering = Annotated[SteeringBody, BeforeValidator(_read_string), OrElse({"type": "string", "examples": [EXAMPLE]})]
