"""The `steering` field: a string such as `warm@0.8+concise@-0.3`, or an object that says more."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from server.api.fields.body import Body, Examples, OrElse
from server.generation.steering_grammar import (
    EXAMPLE,
    LONGEST_SCHEDULE,
    Schedule,
    WantedSteering,
    WantedTerm,
    parse_steering,
)
from steering_vectors.errors import SteeringError
from steering_vectors.profiles.profile import ApplyTo


class SchedulePointBody(Body):
    """A strength, and the token of the completion from which it holds."""

    from_token: int = Field(ge=0, le=LONGEST_SCHEDULE, description="The first token drawn under it; the first has 0.")
    strength: float = Field(description="The strength from there on, or, with a linear schedule, there.")


class SteeringTermBody(Body):
    """One profile of a mix."""

    examples: ClassVar[Examples] = ({"name": "warm", "strength": 0.8},)

    name: str = Field(description="A served profile, NAME or NAME#SHA8.")
    strength: float | None = Field(
        None, description="1, the default, is the profile's calibrated full strength, 0 none, below 0 opposite."
    )
    layers: list[int] | None = Field(None, description="Blocks to steer at, of those the profile has; all if absent.")
    schedule: list[SchedulePointBody] | None = Field(
        None, max_length=64, description="Strengths that change on the way, in the place of strength."
    )
    interpolation: Literal["step", "linear"] | None = Field(
        None, description="How a schedule goes from point to point; step if absent."
    )

    def wanted(self) -> WantedTerm:
        layers = None if self.layers is None else tuple(self.layers)
        if self.schedule is None:
            if self.interpolation is not None:
                raise SteeringError("interpolation is given without schedule", param="steering.interpolation")
            return WantedTerm(self.name, 1.0 if self.strength is None else self.strength, layers)
        if self.strength is not None:
            raise SteeringError("strength and schedule are both given: use only one of them", param="steering.schedule")
        points = tuple((point.from_token, point.strength) for point in self.schedule)
        return WantedTerm(self.name, layers=layers, schedule=Schedule(points, self.interpolation == "linear"))


class SteeringBody(Body):
    """A mix of profiles, and where it applies."""

    examples: ClassVar[Examples] = (
        {"profiles": [{"name": "warm", "strength": 0.8, "layers": [5]}], "apply_to": "generated"},
    )

    profiles: list[SteeringTermBody] = Field(max_length=64, description="The profiles; an empty list is no steering.")
    apply_to: ApplyTo = Field("generated", description="From the last prompt token on, or the whole prompt too.")
    preserve_norm: bool = Field(False, description="Keep the norm of each steered residual.")
    allow_beyond_safe: bool = Field(False, description="Allow strengths beyond the profiles' safe range.")

    def wanted(self, default: ApplyTo = "generated") -> WantedSteering:
        """What is asked for; `default` says where it applies if that is left open."""
        apply_to = self.apply_to if "apply_to" in self.model_fields_set else default
        terms = tuple(term.wanted() for term in self.profiles)
        return WantedSteering(terms, apply_to, self.preserve_norm, self.allow_beyond_safe)


def _read_string(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        terms = parse_steering(value)
    except SteeringError as error:
        raise PydanticCustomError(error.code, "{reason}", {"reason": error.message}) from error
    return {"profiles": [{"name": term.reference, "strength": term.strength} for term in terms]}


Steering = Annotated[SteeringBody, BeforeValidator(_read_string), OrElse({"type": "string", "examples": [EXAMPLE]})]
