"""The bodies of the routes about steering itself: changing a running one, and asking what one would do."""

from __future__ import annotations

from pydantic import Field

from server.schemas.body import Body
from server.schemas.steering import Steering


class ChangeBody(Body):
    """PATCH /generations/{id}."""

    steering: Steering = Field(description="The steering from the next token on; an empty list of profiles is none.")


class ResolveBody(Body):
    """POST /steering/resolve."""

    steering: Steering = Field(description="The steering to look at.")
