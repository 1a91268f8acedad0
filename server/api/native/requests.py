"""The bodies of the routes about steering itself: changing a running one, and asking what one would do."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from server.api.fields.body import Body, Examples
from server.api.fields.steering import Steering


class ChangeBody(Body):
    """PATCH /generations/{id}."""

    examples: ClassVar[Examples] = ({"steering": "warm@-0.5"},)

    steering: Steering = Field(description="The steering from the next token on; an empty list of profiles is none.")


class ResolveBody(Body):
    """POST /steering/resolve."""

    examples: ClassVar[Examples] = ({"steering": "warm@0.8+concise@-0.3"},)

    steering: Steering = Field(description="The steering to look at.")
