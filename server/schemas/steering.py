"""The `steering` field: a string such as `warm@0.8+concise@-0.3`, or an object that says more."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from server.schemas.body import Body, Examples, OrElse
from server.steering import EXAMPLE, WantedSteering, WantedTerm, parse_steering
from steering_vectors.errors import SteeringError
from steering_vectors.profile import ApplyTo


class SteeringTermBody(Body):
    """One profile of a mix."""

    examples: ClassVar[Examples] = ({"name": "warm", "strength": 0.8},)

    name: str = Field(description="A served profile, NAME or NAME#SHA8.")
    strength: float = Field(1.0, description="1 is the profile's calibrated full strength, 0 none, below 0 opposite.")
    layers: list[int] | None = Field(
        None, description="Blocks to steer at, of those the profile has; all if absent.", examples=[[5]]
    )


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
        terms = (
            WantedTerm(term.name, term.strength, None if term.layers is None else tuple(term.layers))
            for term in self.profiles
        )
        return WantedSteering(tuple(terms), apply_to, self.preserve_norm, self.allow_beyond_safe)


def _read_string(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        terms = parse_steering(value)
    except SteeringError as error:
        raise PydanticCustomError(error.code, "{reason}", {"reason": error.message}) from error
    return {"profiles": [{"name": term.reference, "strength": term.strength} for term in terms]}


Steering = Annotated[SteeringBody, BeforeValidator(_read_string), OrElse({"type": "string", "examples": [EXAMPLE]})]
